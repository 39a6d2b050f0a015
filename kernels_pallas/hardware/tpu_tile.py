"""Logits of one tile on a TPU, as [keys, queries], and what is allowed there.

A weight is exp2(factor * (logits - maximum)): the scale and the change of base
are one product, made where the difference is at hand. Queries are never scaled
beforehand, which would round them.
"""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import interpret
from kernels_pallas.hardware import types as hw_types

# Finite, so that differences are never inf - inf. A row that has met no allowed
# key has maximum FLOOR, and exp2(FORBIDDEN - FLOOR) is 0 there, too.
FORBIDDEN = -2.4e38
FLOOR = -1.2e38

_LAST_BY_LAST = (((1,), (1,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Logits:
  """What is done to query key^T.

  Attributes:
    scale: Factor of the logits.
    soft_cap: c in c tanh(scale q k / c), or None.
  """

  scale: float
  soft_cap: float | None

  @property
  def is_scaled(self) -> bool:
    """Whether `of` returns scaled logits: where maxima would else be minima."""
    return self.soft_cap is not None or self.scale <= 0

  @property
  def unit(self) -> float:
    """What `of` has to be multiplied by to be in nats."""
    return 1.0 if self.is_scaled else self.scale

  @property
  def factor(self) -> float:
    """The same in bits."""
    return self.unit * math.log2(math.e)

  def of(
      self, key: Float[Array, "k H"], query: Float[Array, "q H"]
  ) -> Float[Array, "k q"]:
    """Logits, in units of `unit`."""
    logits = multiply(key, query, _LAST_BY_LAST)
    if self.soft_cap is not None:
      return self.soft_cap * jnp.tanh(logits * (self.scale / self.soft_cap))
    return logits * self.scale if self.is_scaled else logits


def multiply(
    x: Array, y: Array, dimensions: jax.lax.DotDimensionNumbers
) -> Float[Array, "m n"]:
  """A product with float32 sums, exact to float32 for float32."""
  if interpret.mode():  # XLA's CPU has not all products of bfloat16.
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  # Else the matrix unit would round float32 to bfloat16.
  is_exact = x.dtype == jnp.float32
  precision = jax.lax.Precision.HIGHEST if is_exact else None
  return jax.lax.dot_general(
      x, y, dimensions, precision, preferred_element_type=jnp.float32
  )


def allowed(
    first_key: hw_types.Index,
    starts: Int[Array, "P q"] | None,
    stops: Int[Array, "P q"],
    block_kv: int,
    query_ids: Int[Array, "1 q"] | None = None,
    key_ids: Int[Array, "1 k"] | None = None,
) -> Bool[Array, "k q"]:
  """Evaluates the spans and ids of a partial tile.

  Args:
    first_key: Position of the tile's first key.
    starts: Spans of the tile's queries; None if all start at 0.
    stops: Their ends.
    block_kv: Keys of the tile.
    query_ids: Ids where the mask has them.
    key_ids: Ids of the tile's keys.
  """
  num_spans, block_q = stops.shape
  # Relative to the tile, so that positions are constants.
  position = jax.lax.broadcasted_iota(jnp.int32, (block_kv, block_q), 0)

  def in_span(p: int) -> jax.Array:
    is_inside = position < stops[p : p + 1] - first_key
    if starts is not None:
      is_inside &= position >= starts[p : p + 1] - first_key
    return is_inside

  inside = functools.reduce(operator.or_, map(in_span, range(num_spans)))
  if query_ids is None or key_ids is None:
    return inside
  # From the lanes to the sublanes: each id along 128 lanes, then repeated.
  by_lane = jnp.broadcast_to(key_ids, (128, block_kv)).T
  by_lane = jnp.concatenate([by_lane] * (block_q // 128), axis=1)
  return inside & (by_lane == query_ids)


def fold_sublanes(x: Float[Array, "k q"], how: str) -> Float[Array, "8 q"]:
  """Reduces whole registers by "max" or "sum"; 8 sublanes remain."""
  return getattr(x.reshape(-1, 8, x.shape[1]), how)(axis=0)


def fold_lanes(x: Float[Array, "k q"]) -> Float[Array, "k 128"]:
  """Adds whole registers; 128 lanes remain."""
  lanes = (x[:, i : i + 128] for i in range(0, x.shape[1], 128))
  return functools.reduce(operator.add, lanes)
