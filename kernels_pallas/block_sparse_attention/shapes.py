"""Named shapes of block-sparse attention."""

import dataclasses

from kernels_pallas.attention import shapes as dense


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """Sizes of one call.

  Attributes:
    dense: Sizes of query, key and value.
    block_q: Queries in a block.
    block_kv: Keys in a block.
    num_heavy: Key blocks of a query block beyond window and sinks.
    window: Keys of the causal window.
    num_sinks: First keys, kept for all.
  """

  dense: dense.Shape
  block_q: int
  block_kv: int
  num_heavy: int
  window: int
  num_sinks: int = 4


TESTS = {
    "ragged_gqa": Shape(
        dense=dense.TESTS["ragged_gqa"],
        block_q=32,
        block_kv=128,
        num_heavy=1,
        window=40,
    ),
    "cross_mqa": Shape(
        dense=dense.TESTS["cross_mqa"],
        block_q=64,
        block_kv=128,
        num_heavy=1,
        window=64,
    ),
    "long": Shape(
        dense=dense.TESTS["long"],
        block_q=64,
        block_kv=128,
        num_heavy=1,
        window=32,
    ),
}

# 64 key blocks, of which a query block reads about 6: a density of 10 %.
BENCHMARKS = {
    "llama3_8b_32k_10pct": Shape(
        dense=dense.square(32_768, 4, 1),
        block_q=512,
        block_kv=512,
        num_heavy=3,
        window=512,
    ),
}
