"""Which slot of its pages each key head takes, on a TPU.

The rule is that of `rule`, on scores as `tpu_lanes` has them: a page a sublane.
Letters as in `decode`.
"""

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.decode import rule as rule_lib
from kernels_pallas.decode.paged import tpu_config
from kernels_pallas.decode.paged import tpu_copies
from kernels_pallas.hardware import types as hw_types


def choose(
    rule: rule_lib.Rule,
    is_by_page: bool,
    sizes: tpu_config.Sizes,
    slots: hw_types.Ref,
    pages: tpu_copies.Pages,
    position: jax.Array,
) -> None:
  """Chooses for all key heads of a sequence.

  Writes the slots, [1, 1, K] in SMEM, and empties in VMEM what is evicted, so
  that it is not seen.
  """
  score, pos = pages.near["score"], pages.near["pos"]

  @pl.loop(0, sizes.call.num_kv_heads)
  def _(k: hw_types.Index):
    order = rule_lib.order(score[k], pos[k], position, rule)
    page = jax.lax.broadcasted_iota(jnp.int32, order.shape, 0)
    order = jnp.where(page < pages.pages_of(k), order, jnp.inf)
    # One number says both which slot and whether its page is freed: reductions
    # to a scalar are dear, and this is one.
    code = _slot_of(order, is_by_page)
    num_slots = sizes.padded_pages * sizes.page_size
    is_freed = code >= num_slots
    slot = jnp.where(is_freed, code - num_slots, code)
    # Of scores that are NaN, too, one of its own.
    slot = jnp.minimum(slot, pages.pages_of(k) * sizes.page_size - 1)
    slots[0, 0, k] = slot
    own, at = pl.ds(slot // sizes.page_size, 1), slot % sizes.page_size
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, sizes.page_size), 1)
    # All of its page, or the slot alone.
    is_evicted = (lane == at) | is_freed
    pos[k, own, :] = jnp.where(is_evicted, -1, pos[k, own, :])
    score[k, own, :] = jnp.where(is_evicted, 0.0, score[k, own, :])


def set_slot(
    sizes: tpu_config.Sizes,
    pages: tpu_copies.Pages,
    k: hw_types.Index,
    slot: jax.Array,
    position: jax.Array,
    scales: hw_types.Ref,
) -> None:
  """Sends back where the new token stands, and its scales [2, K, 1, 1]."""
  page, at = slot // sizes.page_size, slot % sizes.page_size
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, sizes.page_size), 1)
  new = {"pos": position}
  for i, name in enumerate(("key_scale", "value_scale")):
    if name in pages.near:
      new[name] = scales[i, k]
  for name, number in new.items():
    row = pages.near[name].at[k, pl.ds(page, 1)]
    row[...] = jnp.where(lane == at, number, row[...])
    pages.start_row(name, k, page)


def index_of(shape: tuple[int, ...]) -> Int[Array, "m S"]:
  """The index of each slot of [pages, S]."""
  iota = lambda axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis)
  return iota(0) * shape[1] + iota(1)


def _slot_of(order: Float[Array, "M S"], is_by_page: bool) -> Int[Array, ""]:
  """The slot; M S is added where its page is freed."""
  num_pages, page_size = order.shape
  num_slots = num_pages * page_size
  least = order.min(axis=0, keepdims=True).min(axis=1, keepdims=True)
  # Indices as float32: lanes are reduced of that alone.
  index = index_of(order.shape).astype(jnp.float32)
  slot = jnp.where(order == least, index, float(num_slots - 1))
  if not is_by_page:
    return jnp.min(slot).astype(jnp.int32)
  # One protected token makes a page's sum infinite.
  of_page = order.sum(axis=1, keepdims=True)
  least_page = of_page.min(axis=0, keepdims=True)
  first = jax.lax.broadcasted_iota(jnp.int32, of_page.shape, 0) * page_size
  first = jnp.where(
      of_page == least_page, first.astype(jnp.float32), float(num_slots)
  )
  slot = slot.min(axis=0, keepdims=True).min(axis=1, keepdims=True)
  is_freed = (least > -jnp.inf) & (least_page < jnp.inf)
  freed = first.min(axis=0, keepdims=True) + float(num_slots)
  return jnp.min(jnp.where(is_freed, freed, slot)).astype(jnp.int32)
