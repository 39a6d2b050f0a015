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
  return _row(1, length, length, (num_heads, num_kv_heads, head_dim))


def _row(
    batch: int, num_queries: int, num_keys: int, heads: tuple[int, int, int]
) -> Shape:
  """A line of a table; `heads` are query heads, key heads and their size."""
  num_heads, num_kv_heads, head_dim = heads
  return Shape(
      batch=batch,
      num_queries=num_queries,
      num_keys=num_keys,
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
      head_dim=head_dim,
  )


# Small enough to be interpreted: one tile, ragged ends, T != S, GQA, one query.
TESTS = {
    "one_tile": square(128, 2, 2, 64),
    "ragged_gqa": _row(2, 200, 200, (4, 2, 32)),
    "cross_mqa": _row(1, 136, 333, (4, 1, 64)),
    "single_query": _row(2, 1, 257, (2, 1, 128)),
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


def _selected(
    dense: Shape, block_q: int, block_kv: int, window: int, num_heavy: int = 1
) -> SelectionShape:
  return SelectionShape(
      dense=dense,
      block_q=block_q,
      block_kv=block_kv,
      num_heavy=num_heavy,
      window=window,
  )


SELECTION_TESTS = {
    "ragged_gqa": _selected(TESTS["ragged_gqa"], 32, 128, 40),
    "cross_mqa": _selected(TESTS["cross_mqa"], 64, 128, 64),
    "long": _selected(TESTS["long"], 64, 128, 32),
}

# 64 key blocks, of which a query block reads about 6: a density of 10 %.
SELECTION_BENCHMARKS = {
    "llama3_8b_32k_10pct": _selected(
        square(32_768, 4, 1), 512, 512, 512, num_heavy=3
    ),
}
