"""Named shapes of attention: for tests, benchmarks and tile tuning alike."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """Sizes of one call.

  Attributes:
    batch: B.
    num_queries: T.
    num_keys: S.
    num_heads: N, query heads.
    num_kv_heads: K, a divisor of N.
    head_dim: H.
  """

  batch: int = 1
  num_queries: int
  num_keys: int
  num_heads: int
  num_kv_heads: int
  head_dim: int

  def arrays(
      self, dtype: jax.typing.DTypeLike = jnp.bfloat16
  ) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract query, key and value."""
    query = (self.batch, self.num_queries, self.num_heads, self.head_dim)
    key = (self.batch, self.num_keys, self.num_kv_heads, self.head_dim)
    return tuple(
        jax.ShapeDtypeStruct(shape, dtype) for shape in (query, key, key)
    )


def square(
    length: int, num_heads: int, num_kv_heads: int, head_dim: int = 128
) -> Shape:
  """One sequence that attends to itself."""
  return Shape(
      num_queries=length,
      num_keys=length,
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
      head_dim=head_dim,
  )


# Small enough to be interpreted: one tile, ragged ends, T != S, GQA, one query.
TESTS = {
    "one_tile": square(128, 2, 2, 64),
    "ragged_gqa": Shape(
        batch=2,
        num_queries=200,
        num_keys=200,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
    ),
    "cross_mqa": Shape(
        num_queries=136,
        num_keys=333,
        num_heads=4,
        num_kv_heads=1,
        head_dim=64,
    ),
    "single_query": Shape(
        batch=2,
        num_queries=1,
        num_keys=257,
        num_heads=2,
        num_kv_heads=1,
        head_dim=128,
    ),
    "long": square(384, 1, 1, 128),
}

# One key-value group of models that people run, at training lengths.
BENCHMARKS = {
    "llama3_8b_4k": square(4096, 4, 1),
    "llama3_8b_16k": square(16_384, 4, 1),
    "qwen3_8b_32k": square(32_768, 4, 1),
    "smollm_4k": square(4096, 3, 1, 64),
    "mha_4k": square(4096, 1, 1),
    "mha_16k": square(16_384, 1, 1),
}
