"""What a warpgroup does with tiles: products, vectors along them, masks.

Results of matrix instructions are spread over the registers of a warpgroup in
one way, and all arrays here have that layout or that of its rows or columns.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from kernels_pallas import interpret
from kernels_pallas.hardware import gpu_layout
from kernels_pallas.hardware import gpu_math
from kernels_pallas.hardware import types as hw_types

plgpu = gpu_layout.plgpu


def lend_registers(num_consumers: int) -> None:
  """The warpgroup that orders copies leaves registers to two that compute."""
  if num_consumers == 2:
    plgpu.set_max_registers(24, action="decrease")


def borrow_registers(num_consumers: int) -> None:
  """Takes them. A single consumer has all it can address as it is."""
  if num_consumers == 2:
    plgpu.set_max_registers(240, action="increase")


def add_product(
    total: jax.Array, a: hw_types.Ref, b: hw_types.Ref
) -> jax.Array:
  """Total + a @ b, references in shared memory, in the registers of total."""
  if interpret.mode():  # The interpreter has no accumulator that is given.
    return total + product(a, b)
  add = lambda accumulator: plgpu.wgmma(accumulator, a, b)
  return pl.run_state(add)(plgpu.ACC.init(total))


def product(
    a: hw_types.Ref, b: hw_types.Ref, then: Callable[[], None] = lambda: None
) -> jax.Array:
  """Multiplies a @ b in float32, references in shared memory.

  `then` is done while the product is being computed.
  """

  def multiply(accumulator: hw_types.Ref) -> jax.Array:
    plgpu.wgmma(accumulator, a, b)
    then()
    return accumulator[...]

  shape = (a.shape[0], b.shape[1])
  return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def accumulate(total: jax.Array, a: jax.Array, b: hw_types.Ref) -> jax.Array:
  """Adds a @ b; `a` and `total` in registers, `b` in shared memory."""
  if interpret.mode():  # The interpreter has no wgmma of registers.
    total = total + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    # An ordinary read, unlike wgmma's, races with TMA unless it is fenced.
    plgpu.commit_smem()
    return total
  add = lambda accumulator: plgpu.wgmma(accumulator, a, b)
  return pl.run_state(add)(plgpu.ACC.init(total))


def accumulate_and_product(
    total: jax.Array, add: tuple[Any, Any], multiply: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
  """`accumulate(total, *add)` and `product(*multiply)`, awaited once."""
  if interpret.mode():
    return accumulate(total, *add), product(*multiply)

  def compute(accumulators: tuple[hw_types.Ref, hw_types.Ref]) -> None:
    plgpu.wgmma(accumulators[0], *add)
    plgpu.wgmma(accumulators[1], *multiply)

  a, b = multiply
  # Both products are issued before either is awaited.
  zeros = filled((a.shape[0], b.shape[1]), 0.0)
  return pl.run_state(compute)((plgpu.ACC.init(total), plgpu.ACC.init(zeros)))


def filled(shape: tuple[int, ...], value: float) -> jax.Array:
  """A float32 array laid out as results of `product`, or as their rows."""
  layout = plgpu.Layout.WGMMA
  layout = layout if len(shape) == 2 else layout.reduce(1)
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def load_vector(ref: hw_types.Ref, axis: int) -> jax.Array:
  """Loads a vector so that it fits `along(vector, tile, axis)`."""
  layout = plgpu.Layout.WGMMA.reduce(1 - axis)
  return plgpu.load(ref, layout=layout, optimized=False)


def positions(
    shape: tuple[int, ...], axis: int, first: hw_types.Index
) -> jax.Array:
  """An int32 tile of positions along `axis`, from `first` on."""
  layout = plgpu.Layout.WGMMA
  return first + plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)


def allowed_tile(
    refs: Mapping[str, Any],
    batch: hw_types.Index,
    first_query: hw_types.Index,
    first_key: hw_types.Index,
    shape: tuple[int, int],
    query_axis: int,
) -> jax.Array:
  """The mask of a tile whose queries lie along `query_axis`."""
  key_axis = 1 - query_axis

  def load(
      name: str, axis: int, first: hw_types.Index, *lead: int
  ) -> jax.Array:
    ref = refs[name]
    at = (batch if ref.shape[0] > 1 else 0, *lead, pl.ds(first, shape[axis]))
    return gpu_math.along(load_vector(ref.at[at], axis), shape, axis)

  of_query = lambda name, *lead: load(name, query_axis, first_query, *lead)
  # Loaded along the tile's axis that queries have, and repeated along the
  # other.
  spans = [
      (of_query("starts", i), of_query("stops", i))
      for i in range(refs["starts"].shape[1])
  ]
  keys = positions(shape, key_axis, first_key)
  if "query_ids" not in refs:
    return gpu_math.is_allowed(keys, spans)
  key_ids = load("key_ids", key_axis, first_key)
  return gpu_math.is_allowed(keys, spans, of_query("query_ids"), key_ids)
