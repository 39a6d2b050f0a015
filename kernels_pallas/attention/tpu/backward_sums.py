"""dK and dV summed over parts, in HBM, with no memory of their own to speak of.

A part (some heads, a chunk of positions) goes over all tiles of keys. What it
adds to a tile of dK and dV is added to what the parts before left in HBM: a
grid step starts to fetch that sum when it begins, and needs it when it ends.

Sums are float32, exactly. Where the outputs have 16 bits, they hold the upper
half of a sum until the last part rounds it; the lower halves lie in an array
of one sequence and head (of each core), two to a word. So temporaries are as
large as one head's dK and dV, however many parts there are.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.attention.tpu import backward_plan as plan_lib
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.transformations import manual_axes

_UPPER = -(1 << 16)
_LOWER = (1 << 16) - 1


class Sums(NamedTuple):
  """Where a core keeps its sums; of dK and dV, in this order.

  Attributes:
    d_key: [cores, B, K, S, H] in HBM; cores is 1 where no two share a sum.
    d_value: As `d_key`.
    lower: int32 [cores, 2, S / 2, H] in HBM; None where the above are float32.
    buffers: [slots, 2, block_kv, H], of the type of `d_key`.
    lower_buffers: int32 [slots, 2, block_kv / 2, H], or None.
    semaphores: [2, slots, copies], of copies from HBM and to it.
  """

  d_key: hw_types.Ref
  d_value: hw_types.Ref
  lower: hw_types.Ref
  buffers: hw_types.Ref
  lower_buffers: hw_types.Ref
  semaphores: hw_types.Barrier


class Step(NamedTuple):
  """A grid step: which part of a head's work it is, and which tile of keys."""

  core: hw_types.Index
  batch: hw_types.Index
  head: hw_types.Index
  part: hw_types.Index
  num_parts: int
  key_tile: hw_types.Index
  num_key_tiles: int

  @property
  def number(self) -> hw_types.Index:
    """Of the steps of a head."""
    return self.part * self.num_key_tiles + self.key_tile


def outputs(
    plan: plan_lib.Plan, dtype: jnp.dtype
) -> list[jax.ShapeDtypeStruct]:
  """The arrays in HBM: those of `Sums` that are there."""
  sizes = plan.sizes
  shape = (sizes.batch, sizes.num_kv_heads, sizes.num_keys, sizes.head_dim)
  sums = manual_axes.struct((plan.num_sums, *shape), _sum_type(plan, dtype))
  if not _is_halved(plan, dtype):
    return [sums, sums]
  halves = (plan.num_used_cores, 2, sizes.num_keys // 2, sizes.head_dim)
  return [sums, sums, manual_axes.struct(halves, jnp.int32)]


def scratch(plan: plan_lib.Plan, dtype: jnp.dtype) -> list[hw_types.Buffer]:
  """Buffers and semaphores: the rest of `Sums`."""
  slots = plan.num_slots
  shape = (slots, 2, plan.tiles.block_kv, plan.sizes.head_dim)
  is_halved = _is_halved(plan, dtype)
  buffers = [pltpu.VMEM(shape, _sum_type(plan, dtype))]
  if is_halved:
    half = (slots, 2, plan.tiles.block_kv // 2, plan.sizes.head_dim)
    buffers.append(pltpu.VMEM(half, jnp.int32))
  return [*buffers, pltpu.SemaphoreType.DMA((2, slots, 2 + is_halved))]


def num_outputs(plan: plan_lib.Plan, dtype: jnp.dtype) -> int:
  """How many arrays `outputs` makes."""
  return 2 + _is_halved(plan, dtype)


def named(refs: tuple[hw_types.Ref, ...]) -> Sums:
  """What `outputs` and `scratch` made, by name."""
  if len(refs) == 6:
    return Sums(*refs)
  d_key, d_value, buffers, semaphores = refs
  return Sums(d_key, d_value, None, buffers, None, semaphores)


def begin(sums: Sums, step: Step) -> None:
  """Starts to fetch what parts before have found for this tile of keys."""
  slots = sums.buffers.shape[0]

  # The buffer was written to HBM from as many steps ago.
  @pl.when(step.number >= slots)
  def _():
    for copy in _copies(sums, step, step.number % slots, is_store=True):
      copy.wait()

  @pl.when(step.part > 0)
  def _():
    for copy in _copies(sums, step, step.number % slots, is_store=False):
      copy.start()


def end(
    sums: Sums,
    step: Step,
    found: tuple[hw_types.Ref, hw_types.Ref],
    scale: float,
) -> None:
  """Adds what this step has found, and starts to store it.

  Args:
    sums: Where.
    step: Which.
    found: float32 [block_kv, H] of dK and of dV; changed.
    scale: Of dK.
  """
  slots = sums.buffers.shape[0]
  slot = step.number % slots
  is_last = step.part == step.num_parts - 1
  found[0][...] *= scale

  @pl.when(step.part > 0)
  def _():
    for copy in _copies(sums, step, slot, is_store=False):
      copy.wait()
    for i, ref in enumerate(found):
      ref[...] += load(sums, slot, i)

  for i, ref in enumerate(found):
    store(sums, slot, i, ref[...], is_last)
  # A lower half of what is rounded is of no use, but copies that are all alike
  # need no branch.
  for copy in _copies(sums, step, slot, is_store=True):
    copy.start()

  @pl.when(is_last & (step.key_tile == step.num_key_tiles - 1))
  def _():
    for other in range(slots):
      for copy in _copies(sums, step, other, is_store=True):
        copy.wait()


def load(sums: Sums, slot: hw_types.Index, i: int) -> jax.Array:
  """The sum of dK (0) or dV (1) in a buffer, float32 [block_kv, H]."""
  upper = sums.buffers[slot, i].astype(jnp.float32)
  if sums.lower_buffers is None:
    return upper
  words = sums.lower_buffers[slot, i]
  lower = (words & _LOWER, jax.lax.shift_right_logical(words, 16))
  bits = pltpu.bitcast(upper, jnp.int32) | jnp.concatenate(lower, axis=0)
  return pltpu.bitcast(bits, jnp.float32)


def store(
    sums: Sums,
    slot: hw_types.Index,
    i: int,
    values: jax.Array,
    is_last: hw_types.Index | bool,
) -> None:
  """Puts a sum into a buffer; the last one is rounded to the buffer's type."""
  if sums.lower_buffers is None:
    sums.buffers[slot, i] = values
    return
  bits = pltpu.bitcast(values, jnp.int32)
  half = values.shape[0] // 2
  sums.lower_buffers[slot, i] = (bits[:half] & _LOWER) | (bits[half:] << 16)
  # The upper half of the bits is a number of 16 bits: nothing is rounded.
  upper = pltpu.bitcast(bits & _UPPER, jnp.float32)
  result = jnp.where(is_last, values, upper)
  sums.buffers[slot, i] = result.astype(sums.buffers.dtype)


def total(
    parts: Float[Array, "cores B K S H"], dtype: jnp.dtype
) -> Float[Array, "B K S H"]:
  """Adds up what the cores have found."""
  if len(parts) == 1:
    return parts[0]
  return parts.sum(axis=0).astype(dtype)


def _copies(
    sums: Sums, step: Step, slot: hw_types.Index, *, is_store: bool
) -> Iterator[Any]:
  """The copies of a tile of keys; those of any tile count alike in a wait."""
  core, block = step.core, sums.buffers.shape[2]
  place = _own_place(sums, core), step.batch, step.head
  first = tpu_layout.aligned(step.key_tile * block, block)
  half = tpu_layout.aligned(step.key_tile * (block // 2), block // 2)
  pairs = [
      (sums.d_key.at[*place, pl.ds(first, block)], sums.buffers.at[slot, 0]),
      (sums.d_value.at[*place, pl.ds(first, block)], sums.buffers.at[slot, 1]),
  ]
  if sums.lower is not None:
    lower = sums.lower.at[core, :, pl.ds(half, block // 2)]
    pairs.append((lower, sums.lower_buffers.at[slot]))
  for i, (there, here) in enumerate(pairs):
    ends = (here, there) if is_store else (there, here)
    semaphore = sums.semaphores.at[int(is_store), slot, i]
    yield pltpu.make_async_copy(*ends, semaphore)


def _own_place(sums: Sums, core: hw_types.Index) -> hw_types.Index:
  """The core's place in `d_key`: its own only where cores share heads."""
  return core if sums.d_key.shape[0] > 1 else 0


def _is_halved(plan: plan_lib.Plan, dtype: jnp.dtype) -> bool:
  return _sum_type(plan, dtype) != jnp.float32


def _sum_type(plan: plan_lib.Plan, dtype: jnp.dtype) -> jnp.dtype:
  return jnp.dtype(jnp.float32 if plan.num_sums > 1 else dtype)
