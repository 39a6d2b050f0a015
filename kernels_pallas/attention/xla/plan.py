"""Tiles of attention by XLA: which to take, and the lists that they make."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import differentiable
from kernels_pallas.attention import visits
from kernels_pallas.attention.xla import layout as layout_lib
from kernels_pallas.attention.xla import lists as lists_lib
from kernels_pallas.attention.xla import together

# Numbers in a strip of logits: 8 MiB of float32, a share of a CPU's last cache.
_STRIP_SIZE = 2**21
# Rows in a strip, of all heads that share a key head: enough for the products
# to be fast; more than `_MAX_ROWS` would compute more of masked tiles.
_MIN_ROWS, _MAX_ROWS = 128, 256
# Tiles of keys: lists of all tiles must not grow as T S.
_MAX_TILES = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionXlaConfig:
  """Sizes of tiles under a mask; a selection brings its own.

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
) -> AttentionXlaConfig:
  """Chooses tiles by measurements on two cores of an AMD EPYC."""
  block_q = max(_num_rows(num_keys) * num_kv_heads // num_heads, 1)
  # Of a causal mask two strips leave a quarter of the pairs out, one none.
  block_q = min(block_q, max(num_queries // 2, _MIN_ROWS))
  block_kv = -(-num_keys // (128 * _MAX_TILES)) * 128
  return AttentionXlaConfig(
      block_q=min(block_q, num_queries), block_kv=min(block_kv, num_keys)
  )


def lists_of(
    arrays: differentiable.Inputs | differentiable.Saved,
    spec: differentiable.AttentionSpec,
) -> tuple[lists_lib.Lists, layout_lib.Layout]:
  """What each strip reads, and where the strips lie.

  Raises:
    ValueError: If there is a config beside a selection, which is the tiles.
  """
  query, key, where = arrays.query, arrays.key, arrays.where
  if isinstance(where, selection_lib.Selection):
    if spec.config is not None:
      raise ValueError(
          f"config={spec.config!r} is not for a selection by"
          " implementation='xla'; it must be None"
      )
    return _of_selection(query, key, where)
  return _of_mask(query, key, where, spec.config)


def _of_mask(
    query: jax.Array,
    key: jax.Array,
    where: masks.Mask | None,
    config: AttentionXlaConfig | None,
) -> tuple[lists_lib.Lists, layout_lib.Layout]:
  """One list for all heads: those that share a key head go together."""
  num_queries, num_heads = query.shape[1:3]
  num_keys, num_kv_heads = key.shape[1:3]
  config = config or choose_config(
      num_queries, num_keys, num_heads, num_kv_heads
  )
  tiles = (config.block_q, config.block_kv)
  layout = _layout(query, key, num_kv_heads, *tiles)
  # Which tiles a mask forbids, allows, or allows in part.
  states = visits.states_of(where, num_queries, num_keys, *tiles)
  listed = visits.by_query(states)
  lists = lists_lib.Lists(
      table=listed.table,
      num_valid=listed.num_valid,
      is_full=(states != selection_lib.PARTIAL).all(axis=-1),
      mask=lists_lib.cut(where, layout),
      is_complete=True,
  )
  return lists, layout


def _of_selection(
    query: jax.Array, key: jax.Array, where: selection_lib.Selection
) -> tuple[lists_lib.Lists, layout_lib.Layout]:
  """The selection's own lists."""
  num_queries, num_heads = query.shape[1:3]
  num_keys, num_kv_heads = key.shape[1:3]
  # Heads that share a key head and a table are computed together.
  is_shared = where.block_table.shape[1] in (1, num_kv_heads)
  num_units = num_kv_heads if is_shared else num_heads
  num_tiles = -(-num_keys // where.block_kv)
  group, rows = num_heads // num_units, _num_rows(num_keys)
  num_blocks = together.num_blocks(where, num_tiles, group, rows)
  block_q = num_blocks * where.block_q
  layout = _layout(query, key, num_units, block_q, where.block_kv)
  if num_blocks > 1:
    own = together.own_tiles(where, num_tiles, num_blocks)
    table, num_valid = together.lists(own)
    lists = lists_lib.Lists(
        table=table,
        num_valid=num_valid,
        is_full=num_valid < 0,
        mask=lists_lib.cut(where.mask, layout),
        is_complete=False,
        own=own,
    )
    return lists, layout
  # Without a mask inside, only the ends of a last block need one.
  is_ragged = num_keys % where.block_kv or num_queries % where.block_q
  is_known = isinstance(where.num_valid, np.ndarray)
  xp = np if is_known else jnp
  lists = lists_lib.Lists(
      table=where.block_table,
      num_valid=where.num_valid,
      is_full=xp.full(
          where.num_valid.shape, where.mask is None and not is_ragged
      ),
      mask=lists_lib.cut(where.mask, layout),
      is_complete=False,
  )
  return lists, layout


def _num_rows(num_keys: int) -> int:
  """As many as keep a strip of logits in the cache, within reason."""
  return min(max(_STRIP_SIZE // num_keys, _MIN_ROWS), _MAX_ROWS)


def _layout(
    query: jax.Array,
    key: jax.Array,
    num_units: int,
    block_q: int,
    block_kv: int,
) -> layout_lib.Layout:
  return layout_lib.Layout(
      batch_size=query.shape[0],
      num_queries=query.shape[1],
      num_keys=key.shape[1],
      num_heads=query.shape[2],
      num_kv_heads=key.shape[2],
      num_units=num_units,
      block_q=block_q,
      block_kv=block_kv,
  )
