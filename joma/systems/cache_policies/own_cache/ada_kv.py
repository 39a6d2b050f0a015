"""Heads of a layer share its slots out after the prompt.

Letters: B batch, T new tokens, K key and value heads, G query heads of each, C
slots a head on average, M = K C slots of a layer, H head size.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from joma.inference.cache import cache_options
from joma.inference.cache import calls
from joma.inference.cache import head_pool
from joma.inference.cache import kv_cache
from joma.inference.cache import policy as policy_lib
from joma.systems.cache_policies import names
from joma.transformer import config as configs
from joma.transformer import full_cache
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaKV(head_pool.SharesOut):
  """One choice over all heads of a layer, after the prompt (arXiv 2407.11550).

  Heads whose attention is spread get more slots than those that look at little.
  A head's slots are its own from then on.

  Paper's settings: a floor of .2 of a head's equal share.

  Attributes:
    base: Whose priority is compared across heads; not one that ties the heads
      of a layer together, as TOVA does.
    floor: Share of the average budget that every head gets.
  """

  label: ClassVar[str] = "AdaKV"
  floor: float = 0.2

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.floor <= 1:
      raise errors.UserError(f"floor={self.floor} must be in [0, 1].")
    if not self.base.ranks_heads_alone:
      base = names.name_of(self.base)
      raise errors.UserError(
          f"adakv:{base}: {base} has no priority of each head alone; give one"
          f" that has, as adakv:{names.COMPARED[0]}."
      )

  def sized(self, capacity: int) -> policy_lib.Policy:
    """Protects what the base protects."""
    base = self.base.with_capacity(capacity)
    return dataclasses.replace(
        self, base=base, num_sinks=base.num_sinks, num_recent=base.num_recent
    )

  def capacities(self, num_layers: int, capacity: int) -> tuple[int, ...]:
    """Those of the base."""
    return calls.capacities(self.base, num_layers, capacity)

  def least(self, capacity: int) -> int:
    """Slots that every head gets."""
    protected = self.base.num_sinks + (self.base.num_recent or 0) + 1
    return max(int(self.floor * capacity), protected)

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
      options: cache_options.CacheOptions,
  ) -> head_pool.PooledCache:
    """Returns a `PooledCache`: K C slots, and a page less one more a head."""
    full_cache.check_rotations_stay("adakv", config, layer)
    if options != cache_options.DEFAULT:
      raise errors.UserError(
          "adakv keeps rotated keys at absolute positions, slot by slot: leave"
          " keys, positions and page_size as they are."
      )
    shape = (batch_size, config.num_kv_heads, capacity, config.head_dim)
    num_groups = config.num_heads // config.num_kv_heads
    cache = _empty(self, shape, num_groups, dtype)
    pool = dataclasses.replace(cache.pool, layer=layer)
    return dataclasses.replace(cache, pool=pool)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(
    policy: AdaKV,
    shape: tuple[int, int, int, int],
    num_groups: int,
    dtype: jax.typing.DTypeLike,
) -> head_pool.PooledCache:
  """Returns a pool for K C slots: of layer 0, one program for all layers."""
  batch_size, num_kv_heads, capacity, head_dim = shape
  size = head_pool.page_size_of(capacity, dtype)
  # The most pages that budgets of K C slots can take.
  num_pages = num_kv_heads * (capacity + size - 1) // size
  pool = kv_cache.init_layer(
      policy.base,
      0,
      (batch_size, 1, num_pages * size, head_dim),
      num_groups,
      dtype,
  )
  state = calls.init_state(
      policy.base, batch_size, num_kv_heads, head_dim, num_groups
  )
  budgets = jnp.full((batch_size, num_kv_heads), capacity, jnp.int32)
  index, _ = head_pool.layout(budgets, size, num_pages * size)
  pos = jnp.where(index < 0, head_pool.CLOSED, pool.pos[:, 0])[:, None]
  pool = dataclasses.replace(pool, state=state, pos=pos)
  return head_pool.PooledCache(pool, budgets, policy, capacity, size)
