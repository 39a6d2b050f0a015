"""What a TPU does with rows of keys and values, of slots and of pages alike.

Letters: G query heads of a key head, L rows at a time, H head size.
"""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.decode import rule as rule_lib
from kernels_pallas.decode import slots as slots_lib
from kernels_pallas.decode import tpu_int8
from kernels_pallas.hardware import tpu_tile
from kernels_pallas.hardware import types as hw_types

_LAST_BY_LAST = (((1,), (1,)), ((), ()))
_LAST_BY_FIRST = (((1,), (0,)), ((), ()))


def product_type(
    query: jax.typing.DTypeLike, stored: jax.typing.DTypeLike
) -> jax.typing.DTypeLike:
  """Type of the factors of a product: float32 where either side is."""
  return jnp.float32 if jnp.float32 in (query, stored) else jnp.bfloat16


def logits_of(
    query: Float[Array, "G H"],
    rows: Array,
    factor: jax.Array | float,
    rule: rule_lib.Rule,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "G L"]:
  """Capped logits; `factor` [1, L] is the rule's scale, times that of keys."""
  # On a v4, rows of int8 are widened in an order of their own, and the few
  # logits are put in order instead.
  query, is_old = query.astype(dtype), tpu_int8.is_needed(rows, dtype)
  rows = tpu_int8.widened(rows) if is_old else rows.astype(dtype)
  products = tpu_tile.multiply(query, rows, _LAST_BY_LAST)
  products = tpu_int8.in_order(products) if is_old else products
  return rule_lib.capped(products * factor, rule)


def weighted(
    weights: Float[Array, "G L"], rows: Array, dtype: jax.typing.DTypeLike
) -> Float[Array, "G H"]:
  """The sum of the rows, weighted."""
  if tpu_int8.is_needed(rows, dtype):
    weights, rows = tpu_int8.reordered(weights), tpu_int8.widened(rows)
  return tpu_tile.multiply(
      weights.astype(dtype), rows.astype(dtype), _LAST_BY_FIRST
  )


def joined(
    weights: Float[Array, "G L"], rule: rule_lib.Rule
) -> Float[Array, "1 L"]:
  """Of the query heads of a group their sum or maximum."""
  return getattr(weights, rule.reduce)(axis=0, keepdims=True)


def as_stored(
    rows: Float[Array, "K H"], dtype: jax.typing.DTypeLike
) -> tuple[Float[Array, "K H"], Float[Array, "K 1"] | None]:
  """New rows as the numbers that are stored, and with int8 their scales."""
  rows = rows.astype(jnp.float32)
  if dtype != jnp.int8:
    return rows.astype(dtype).astype(jnp.float32), None
  steps, scale = slots_lib.quantize(rows)
  return steps.astype(jnp.float32), scale[:, None]


def as_read(
    rows: Float[Array, "K H"], dtype: jax.typing.DTypeLike
) -> Float[Array, "K H"]:
  """New rows as they will be read again: rounded."""
  numbers, scale = as_stored(rows, dtype)
  return numbers if scale is None else numbers * scale


def replaced(
    kept: Array, row: Float[Array, "1 H"], index: hw_types.Index
) -> Array:
  """Puts a row in the place of another, among all of a tile."""
  at = jax.lax.broadcasted_iota(jnp.int32, kept.shape, 0)
  return jnp.where(at == index, row, kept.astype(jnp.float32)).astype(
      kept.dtype
  )


def first_of_least(
    order: Float[Array, "K C"], size: int
) -> tuple[Float[Array, "K 1"], Float[Array, "K C"]]:
  """Index of the least of each row, the first of equal ones.

  Also what it is the minimum of. A row of NaN has its last one: copies to where
  it says stay within the cache.
  """
  # Indices as float32: lanes are reduced of that alone.
  column = jax.lax.broadcasted_iota(jnp.int32, order.shape, 1)
  column = column.astype(jnp.float32)
  least = order.min(axis=1, keepdims=True)
  first = jnp.where(order == least, column, float(size - 1))
  return first.min(axis=1, keepdims=True), first


def by_sequence(
    array: jax.Array | jax.ShapeDtypeStruct,
    memory_space: pltpu.MemorySpace | None = None,
) -> pl.BlockSpec:
  """All of a sequence, whose number is the first of the grid."""
  zeros = (0,) * (array.ndim - 1)
  block = (1, *array.shape[1:])
  return pl.BlockSpec(
      block, lambda b, *_: (b, *zeros), memory_space=memory_space
  )


def await_bytes(ref: hw_types.Ref, semaphore: hw_types.Barrier) -> None:
  """Waits for so many bytes as `ref` has, whichever copies bring them."""
  pltpu.make_async_copy(ref, ref, semaphore).wait()
