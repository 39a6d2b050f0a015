"""Named shapes of the gated delta rule: for tests, benchmarks and tuning."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """Sizes of one call.

  Attributes:
    batch: B.
    length: T.
    num_heads: N, value heads; each has gates and a state.
    num_key_heads: K, a divisor of N.
    key_size: H.
    value_size: J.
    is_by_channel: Whether each key channel has its own decay.
  """

  batch: int = 1
  length: int
  num_heads: int
  num_key_heads: int
  key_size: int
  value_size: int
  is_by_channel: bool = False

  def arrays(
      self, dtype: jax.typing.DTypeLike = jnp.bfloat16
  ) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract query, key, value, log_decay and beta."""
    rows = (self.batch, self.length)
    vector = (*rows, self.num_key_heads, self.key_size)
    heads = (*rows, self.num_heads)
    decays = (*heads, *[self.key_size] * self.is_by_channel)
    shapes = (vector, vector, (*heads, self.value_size))
    return (
        *(jax.ShapeDtypeStruct(x, dtype) for x in shapes),
        *(jax.ShapeDtypeStruct(x, jnp.float32) for x in (decays, heads)),
    )

  def state(self) -> jax.ShapeDtypeStruct:
    """Abstract state."""
    sizes = (self.key_size, self.value_size)
    shape = (self.batch, self.num_heads, *sizes)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _row(
    batch: int,
    length: int,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    is_by_channel: bool = False,
) -> Shape:
  """A line of a table; heads and sizes are those of values and of keys."""
  return Shape(
      batch=batch,
      length=length,
      num_heads=heads[0],
      num_key_heads=heads[1],
      key_size=sizes[1],
      value_size=sizes[0],
      is_by_channel=is_by_channel,
  )


# Small: one chunk, ragged ends, shared key heads, one position.
TESTS = {
    "one_chunk": _row(1, 64, (2, 2), (16, 32)),
    "ragged_grouped": _row(2, 100, (4, 2), (32, 16)),
    "ragged_channels": _row(2, 100, (2, 1), (32, 16), is_by_channel=True),
    "single": _row(2, 1, (2, 1), (16, 16)),
}

# Heads of models that people train, at their lengths.
BENCHMARKS = {
    f"h128_{value_size}_{length // 1024}k": _row(
        4 if length == 4096 else 1, length, (8, 8), (value_size, 128)
    )
    for length in (4096, 16_384, 65_536)
    for value_size in (128, 256)
}
