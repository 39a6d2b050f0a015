"""Dense attention by XLA, without a T x S array; what CPUs run.

Whole rows of the softmax, for some queries and one key head at a time; tiles of
keys that the mask forbids are not read, see `loops`.
"""

import dataclasses
from typing import Any

from jaxtyping import Array, Float

from kernels_pallas import masks
from kernels_pallas import output
from kernels_pallas import selection
from kernels_pallas.attention import differentiable
from kernels_pallas.attention import visits
from kernels_pallas.attention.xla import layout as xla_layout
from kernels_pallas.attention.xla import lists as xla_lists
from kernels_pallas.attention.xla import loops

# Numbers in a strip of logits: 8 MiB of float32, a share of a CPU's last cache.
_STRIP_SIZE = 2**21
# Rows in a strip, of all heads that share a key head: enough for the products
# to be fast; more than `_MAX_ROWS` would compute more of masked tiles.
_MIN_ROWS, _MAX_ROWS = 128, 256
# Tiles of keys: lists of all tiles must not grow as T S.
_MAX_TILES = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes of tiles.

  Attributes:
    block_q: Queries in a strip.
    block_kv: Keys that are skipped or read together.
  """

  block_q: int
  block_kv: int = 128

  def __post_init__(self):
    for name, size in vars(self).items():
      if size < 1:
        raise ValueError(f"{name}={size} must be at least 1")


def choose_config(
    num_queries: int, num_keys: int, num_heads: int, num_kv_heads: int
) -> Config:
  """Chooses tiles by measurements on two cores of an AMD EPYC."""
  rows = min(max(_STRIP_SIZE // num_keys, _MIN_ROWS), _MAX_ROWS)
  block_q = max(rows * num_kv_heads // num_heads, 1)
  block_kv = -(-num_keys // (128 * _MAX_TILES)) * 128
  return Config(
      block_q=min(block_q, num_queries), block_kv=min(block_kv, num_keys)
  )


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: masks.Mask | None,
    sink_logits: Float[Array, "N"] | None,
    row_weights: Float[Array, "B N T"] | None,
    spec: differentiable.AttentionSpec,
) -> output.AttentionOutput:
  """Computes the op, see `differentiable`."""
  lists, layout = _plan(query, key, where, spec)
  return loops.forward(
      query, key, value, sink_logits, row_weights, spec, lists, layout
  )


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: masks.Mask | None,
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
    spec: differentiable.AttentionSpec,
) -> tuple[Array, Array, Array]:
  """Computes the cotangents of query, key and value, see `differentiable`."""
  lists, layout = _plan(query, key, where, spec)
  return loops.backward(
      query, key, value, lse, delta, d_out, spec, lists, layout
  )


def _plan(
    query: Any, key: Any, where: masks.Mask | None, spec: Any
) -> tuple[xla_lists.Lists, xla_layout.Layout]:
  batch, num_queries, num_heads = query.shape[:3]
  num_keys, num_kv_heads = key.shape[1:3]
  config = spec.config or choose_config(
      num_queries, num_keys, num_heads, num_kv_heads
  )
  layout = xla_layout.Layout(
      batch_size=batch,
      num_queries=num_queries,
      num_keys=num_keys,
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
      num_units=num_kv_heads,
      block_q=config.block_q,
      block_kv=config.block_kv,
  )
  states = visits.states_of(
      where, num_queries, num_keys, config.block_q, config.block_kv
  )
  listed = visits.by_query(states)
  lists = xla_lists.Lists(
      table=listed.table,
      num_valid=listed.num_valid,
      is_full=(states != selection.PARTIAL).all(axis=-1),
      mask=xla_lists.cut(where, layout),
      is_complete=True,
  )
  return lists, layout
