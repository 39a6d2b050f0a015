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


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionShape:
  """Sizes of one call under a selection.

  Attributes:
    dense: Sizes of query, key and value.
    block_q: Queries in a block.
    block_kv: Keys in a block.
    num_heavy: Key blocks of a query block beyond window and sinks.
    window: Keys of the causal window.
    num_sinks: First keys, kept for all.
  """

  dense: Shape
  block_q: int
  block_kv: int
  num_heavy: int
  window: int
  num_sinks: int = 4


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

SELECTION_TESTS = {
    "ragged_gqa": SelectionShape(
        dense=TESTS["ragged_gqa"],
        block_q=32,
        block_kv=128,
        num_heavy=1,
        window=40,
    ),
    "cross_mqa": SelectionShape(
        dense=TESTS["cross_mqa"],
        block_q=64,
        block_kv=128,
        num_heavy=1,
        window=64,
    ),
    "long": SelectionShape(
        dense=TESTS["long"],
        block_q=64,
        block_kv=128,
        num_heavy=1,
        window=32,
    ),
}

# 64 key blocks, of which a query block reads about 6: a density of 10 %.
SELECTION_BENCHMARKS = {
    "llama3_8b_32k_10pct": SelectionShape(
        dense=square(32_768, 4, 1),
        block_q=512,
        block_kv=512,
        num_heavy=3,
        window=512,
    ),
}
