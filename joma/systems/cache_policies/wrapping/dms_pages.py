"""Thresholds over pages: what leaves gives its memory back.

  caches = in_pages(caches, num_free=64)   # after a prompt
  ...                                      # 64 steps at most
  caches = in_pages(caches, num_free=64)   # and again

A head owns as many pages as its tokens need, and `num_free` tokens to come:
other heads' need costs it nothing, where `dms.without_unused` gives all heads
of a layer the slots of the fullest. A layer's arrays have the pages of the
sequence that needs most.

Letters: B batch, K key and value heads, C slots, P pages of S slots, M = P S.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int
import numpy as np

from joma.inference.cache import head_pool
from joma.inference.cache import kv_cache
from joma.inference.cache import slot_arrays
from kernels_pallas.decode import slots as kernel_slots
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

Cache = kv_cache.SlotCache | head_pool.PooledCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paged(head_pool.SharesOut):
  """The policy of pages that hold what another policy keeps in slots."""

  def least(self, capacity: int) -> int:
    """A token: no prompt is shared out here."""
    del capacity
    return 1


def in_pages(
    caches: Sequence[Cache], num_free: int, page_size: int | None = None
) -> tuple[head_pool.PooledCache, ...]:
  """Lays what caches hold out in as few pages as hold it.

  On the host: shapes are other ones then, for which a step compiles anew. Until
  the next call a head takes its tokens into its own pages; where more come than
  there is room for, its least leaves, as without a threshold.

  Args:
    caches: Of slots, one a layer, whose keys are rotated; or as returned here.
    num_free: Tokens to come for which each head has room.
    page_size: S; None is that of before, or by the capacity as `head_pool` has
      it.

  Raises:
    UserError: A cache has other slots.
  """
  require.at_least("num_free", num_free, 1)
  if page_size is not None:
    require.at_least("page_size", page_size, 1)
  return tuple(_laid_out(cache, num_free, page_size) for cache in caches)


def _laid_out(
    cache: Cache, num_free: int, page_size: int | None
) -> head_pool.PooledCache:
  pool, policy, size, is_own = _flat(cache)
  size = size if page_size is None else page_size
  pos, heads = np.asarray(pool.pos[:, 0]), is_own.shape[1]
  counts = (is_own & (pos >= 0)[:, None]).sum(axis=2)
  num_pages = -(-(counts + num_free) // size)
  most = int(num_pages.sum(axis=1).max())
  budgets = jnp.asarray(num_pages * size, jnp.int32)
  index = jnp.asarray(_sources(pos, is_own, num_pages * size, most * size))
  _, owners = head_pool.layout(budgets, size, most * size)
  empty = jnp.where(owners == heads, kernel_slots.CLOSED, kernel_slots.EMPTY)
  taken = jnp.maximum(index, 0)[:, None]
  names = ("key", "value", "score", "pos", "aux")
  arrays = {
      name: jax.tree.map(
          lambda x: slot_arrays.take(x, taken), getattr(pool, name)
      )
      for name in names
  }
  pos = jnp.where(index < 0, empty, arrays["pos"][:, 0])[:, None]
  arrays["pos"] = pos.astype(jnp.int32)
  pool = dataclasses.replace(pool, **arrays)
  # Heads alike: as many whole pages each as there are.
  return head_pool.PooledCache(
      pool, budgets, policy, most // heads * size, size
  )


def _flat(
    cache: Cache,
) -> tuple[kv_cache.SlotCache, Paged, int, Bool[np.ndarray, "B K M"]]:
  """All heads' slots as one row of slots, and whether each is a head's."""
  if isinstance(cache, head_pool.PooledCache):
    if not isinstance(cache.policy, Paged):
      raise errors.UserError(
          "in_pages lays slots out in pages, and these pages are shared out"
          " already."
      )
    heads = np.arange(cache.num_kv_heads)[:, None]
    is_own = np.asarray(cache.owner)[:, None] == heads
    return cache.pool, cache.policy, cache.page_size, is_own
  plain = cache.rank is None and cache.options.keys == "rotated"
  if not plain or cache.options.page_size > 1:
    raise errors.UserError(
        "in_pages takes rotated keys at absolute positions, slot by slot: leave"
        " keys, positions and page_size of the cache as they are."
    )
  heads, capacity = cache.pos.shape[1:]
  flat: Any = lambda x: x.reshape(len(x), 1, -1, *x.shape[3:])
  named = ("key", "value", "score", "pos", "aux")
  arrays = {n: jax.tree.map(flat, getattr(cache, n)) for n in named}
  policy = dataclasses.replace(
      Paged(base=cache.policy),
      num_sinks=cache.policy.num_sinks,
      num_recent=cache.policy.num_recent,
  )
  size = head_pool.page_size_of(capacity, cache.key.data.dtype)
  is_own = np.arange(heads * capacity) // capacity == np.arange(heads)[:, None]
  is_own = np.broadcast_to(is_own, (len(cache.pos), *is_own.shape))
  return dataclasses.replace(cache, **arrays), policy, size, is_own


def _sources(
    pos: Int[np.ndarray, "B m"],
    is_own: Bool[np.ndarray, "B K m"],
    budgets: Int[np.ndarray, "B K"],
    num_slots: int,
) -> Int[np.ndarray, "B M"]:
  """Where each new slot's token is now; -1 is none. Oldest first in a head."""
  found = np.full((len(pos), num_slots), -1, np.int32)
  first = np.cumsum(budgets, axis=1) - budgets
  for b, k in np.ndindex(*budgets.shape):
    mine = np.flatnonzero(is_own[b, k] & (pos[b] >= 0))
    mine = mine[np.argsort(pos[b, mine])]
    found[b, first[b, k] : first[b, k] + len(mine)] = mine
  return found
