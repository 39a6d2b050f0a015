"""Named shapes of linear attention: for tests, benchmarks and tuning alike."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """Sizes of one call.

  Attributes:
    batch: B.
    length: T.
    num_heads: N, query heads; each has a decay and a state.
    num_kv_heads: K, a divisor of N.
    head_dim: H.
  """

  batch: int = 1
  length: int
  num_heads: int
  num_kv_heads: int
  head_dim: int

  def arrays(
      self, dtype: jax.typing.DTypeLike = jnp.bfloat16
  ) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract query, key and value."""
    heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
    return tuple(
        jax.ShapeDtypeStruct((self.batch, self.length, n, self.head_dim), dtype)
        for n in heads
    )


# Small enough to be interpreted: one chunk, ragged ends, GQA, one position.
TESTS = {
    "one_chunk": Shape(length=128, num_heads=2, num_kv_heads=2, head_dim=32),
    "ragged_gqa": Shape(
        batch=2, length=200, num_heads=4, num_kv_heads=2, head_dim=16
    ),
    "ragged_mqa": Shape(length=300, num_heads=3, num_kv_heads=1, head_dim=24),
    "single": Shape(
        batch=2, length=1, num_heads=2, num_kv_heads=1, head_dim=64
    ),
}

# Heads of models that people run, at training lengths.
BENCHMARKS = {
    f"h128_{length // 1024}k": Shape(
        length=length, num_heads=8, num_kv_heads=8, head_dim=128
    )
    for length in (4096, 16_384, 65_536)
}
