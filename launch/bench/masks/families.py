"""The masks of the bench: twelve families, their pairs and their tiles.

The families are those of LongCA-bench (https://arxiv.org/abs/2510.17896) and of
FlashMask (https://arxiv.org/abs/2410.01359); documents and windows come in both
of their forms. Lengths of documents and the rest are drawn once from a seed, in
the proportions that the names say, so that a mask of any length has the same
share of its pairs.

Letters: T queries and keys.
"""

from collections.abc import Callable
import dataclasses

import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection

# Queries and keys of a tile that the table counts, and of the blocks.
BLOCK = 128


def _cuts(length: int, num: int) -> np.ndarray:
  """Ids of at most `num` pieces of drawn lengths [T]."""
  rng = np.random.default_rng(num)
  starts = np.unique(np.floor(rng.random(num - 1) * length).astype(np.int32))
  return np.searchsorted(starts, np.arange(length), side="right").astype(
      np.int32
  )


def _answers(length: int) -> masks.Mask:
  """Two questions with answers: pieces of eight, groups of two."""
  pieces = _cuts(length, 8)
  groups = (np.arange(length) >= length // 2).astype(np.int32)
  return masks.share_question(pieces + 8 * groups, groups)


def _kept(length: int) -> masks.Mask:
  """Half of the tokens, in runs, as queries and as keys."""
  kept = _cuts(length, 16) % 2 == 0
  return masks.query_key_sparse(kept, kept)


def _hashed(length: int) -> masks.Mask:
  """Four buckets, sorted as a kernel would have them: runs of one bucket."""
  buckets = _cuts(length, 16) % 4
  return masks.hash_sparse(buckets, buckets)


def _window(length: int) -> int:
  return max(1, length // 8)


FAMILIES: dict[str, Callable[[int], masks.Mask]] = {
    "full": lambda length: masks.full(length, length),
    "causal": masks.causal,
    "document": lambda length: masks.document(
        _cuts(length, 6), is_causal=False
    ),
    "document, causal": lambda length: masks.document(_cuts(length, 6)),
    "block-causal document": lambda length: masks.block_causal_document(
        _cuts(length, 6), block_size=max(1, length // 16)
    ),
    "causal blockwise": lambda length: masks.causal_blockwise(_cuts(length, 6)),
    "share question": _answers,
    "prefix LM": lambda length: masks.prefix_lm(length, prefix_len=length // 4),
    "prefix LM, document": lambda length: masks.prefix_lm_document(
        _cuts(length, 6), prefix_len=max(1, length // 16)
    ),
    "sliding window": lambda length: masks.sliding_window(
        length, window=_window(length), is_causal=False
    ),
    "sliding window, causal": lambda length: masks.sliding_window(
        length, window=_window(length)
    ),
    "global and window": lambda length: masks.global_window(
        length,
        window=_window(length),
        num_global=min(length, BLOCK // 4),
        is_causal=True,
    ),
    "query-key sparse": _kept,
    "hash sparse": _hashed,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
  """Tiles of a mask.

  Attributes:
    visited: In which a pair may be.
    full: Of them, those in which every pair is.
  """

  visited: int
  full: int


def num_pairs(mask: masks.Mask) -> int:
  """Pairs that a mask without a batch allows, in O(T log T).

  Args:
    mask: Known. Its spans are disjoint, so that keys are counted once.
  """
  if mask.query_ids is None:
    return int((mask.stops - mask.starts).clip(min=0).sum())
  query_ids = np.asarray(mask.query_ids)
  key_ids = np.asarray(mask.key_ids)
  total = 0
  for one in np.unique(query_ids):
    keys = np.flatnonzero(key_ids == one)
    rows = query_ids == one
    starts, stops = mask.starts[:, rows], mask.stops[:, rows]
    inside = np.searchsorted(keys, stops) - np.searchsorted(keys, starts)
    total += int(inside.clip(min=0).sum())
  return total


def tiles_of(mask: masks.Mask, length: int, block: int = BLOCK) -> Tiles:
  """Counts tiles of `block` queries and keys."""
  states = selection.tile_states(mask, length, length, block, block)
  return Tiles(
      visited=int((states > selection.EMPTY).sum()),
      full=int((states == selection.FULL).sum()),
  )
