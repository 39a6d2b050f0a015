"""Which tokens of a text stay when heads, or layers, are compared.

With a budget of each head's own all heads keep as many tokens. Compared over a
layer or the whole model, as in KVzip (arXiv 2505.23416), as many stay in all,
and heads that look at little make room for those that need more.

Letters: B texts, K key and value heads, C slots.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.cache import slot_arrays
from joma.inference.cache import slot_step
from joma.inference.evaluation.ruler import ruler_config
from scansnap_jax.experiment import errors


def trim(
    caches: Sequence[Any],
    sizes: Int[Array, "B"],
    position: Int[Array, "B"],
    *,
    scope: ruler_config.Scope,
) -> tuple[kv_cache.SlotCache, ...]:
  """Empties all but the slots of greatest priority among those of many heads.

  Slots that are emptied stay where they are: the next tokens take them.

  Args:
    caches: One a layer, all of one policy.
    sizes: Tokens that a head keeps on average.
    position: Of each text's next token.
    scope: `layer` compares the heads of a layer, `model` those of all layers.

  Raises:
    UserError: A cache has no slots of each head that could be compared.
  """
  for cache in caches:
    if not (isinstance(cache, kv_cache.SlotCache) and cache.policy.evicts):
      raise errors.UserError(
          f"{type(cache).__name__} does not choose among the tokens of each"
          f" head, so that ruler.scope={scope} has nothing to compare: leave"
          " ruler.scope out."
      )
  groups = [caches] if scope == "model" else [[cache] for cache in caches]
  return tuple(
      keep(cache, is_kept, position)
      for group in groups
      for cache, is_kept in zip(
          group, _best(group, sizes, position), strict=True
      )
  )


def _best(
    caches: Sequence[kv_cache.SlotCache],
    sizes: Int[Array, "B"],
    position: Int[Array, "B"],
) -> list[Bool[Array, "B K C"]]:
  """The slots of some layers that stay, chosen from all of them at once."""
  flat = []
  for cache in caches:
    # Protected tokens come first, empty slots last; of equal ones the newest.
    ranks = calls.rank(cache.policy, slot_step.view(cache), position)
    ranks = jnp.where(cache.pos >= 0, ranks, -jnp.inf)
    flat.append(ranks[..., ::-1].reshape(len(sizes), -1))
  order = jnp.argsort(jnp.argsort(jnp.concatenate(flat, 1), descending=True))
  num_heads = sum(cache.pos.shape[1] for cache in caches)
  is_kept = order < (sizes * num_heads)[:, None]
  found, start = [], 0
  for cache, ranks in zip(caches, flat, strict=True):
    part = is_kept[:, start : start + ranks.shape[1]]
    found.append(part.reshape(cache.pos.shape)[..., ::-1])
    start += ranks.shape[1]
  return found


def keep(
    cache: kv_cache.SlotCache,
    is_kept: Bool[Array, "B K C"],
    position: Int[Array, "B"],
) -> kv_cache.SlotCache:
  """Empties the slots of a layer that are not kept."""
  every = slot_arrays.every_slot(cache.pos)
  stays = is_kept & (cache.pos >= 0)
  cache = slot_step.handed_on(cache, every, stays, position)
  return with_positions(cache, jnp.where(is_kept, cache.pos, -1))


def with_positions(
    cache: kv_cache.SlotCache, pos: Int[Array, "B K C"]
) -> kv_cache.SlotCache:
  """Puts positions in, and what depends on them."""
  rank = None if cache.rank is None else slot_arrays.ranks_of(pos)
  return dataclasses.replace(cache, pos=pos, rank=rank)
