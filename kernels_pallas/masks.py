"""Attention masks that need O(T + S) memory: spans of keys, and ids.

A `Mask` says of every query which keys it may attend to: those inside one of at
most two spans and, where ids are given, those whose id equals the query's. The
families of long-context training (documents, blocks, prefixes, windows, sinks,
shared questions, hashed buckets) are all of this form, so that no kernel needs
a T x S array, and a kernel tells from a few integers whether a tile of queries
and keys is empty, partial or full.

Letters: T queries, S keys, P spans a query (1 or 2), B batch (may be absent).
Query t stands at key position t + offset. Masks made from Python numbers and
NumPy arrays are NumPy arrays themselves: they are known while a program is
traced, and whole tiles can be left out of it. Offsets, windows and other
numbers may also be traced, and may differ between the sequences of a batch.

A negative id is padding: it attends to nothing, nothing attends to it.

The families are those of LongCA-bench (https://arxiv.org/abs/2510.17896) and of
FlashMask (https://arxiv.org/abs/2410.01359).
"""

import dataclasses
import types

import jax
from jaxtyping import Bool, Int
import numpy as np

from kernels_pallas import array_types
from kernels_pallas import spans

AnyArray = array_types.AnyArray
Number = array_types.Number
to_rank = spans.to_rank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
  """Query t may attend to key s if a span of t holds s and their ids are equal.

  Attributes:
    starts: First key of each span, int32 [P, T] or [B, P, T].
    stops: One past its last key, of the same shape. A span with start >= stop
      is empty. The spans of a query are disjoint, the first before the second.
    query_ids: int32 [T] or [B, T]; None where ids do not matter.
    key_ids: int32 [S] or [B, S]; None exactly where `query_ids` is.
  """

  starts: array_types.Leaf
  stops: array_types.Leaf
  query_ids: array_types.Leaf = None
  key_ids: array_types.Leaf = None

  def __and__(self, other: "Mask") -> "Mask":
    """Keys that both allow. One of the two must have a single span."""
    one, two = sorted((self, other), key=lambda mask: mask.starts.shape[-2])
    if one.starts.shape[-2] > 1:
      raise ValueError("masks of two spans each cannot be combined by &")
    if one.query_ids is not None and two.query_ids is not None:
      raise ValueError("masks with ids each cannot be combined by &")
    # The one with a single span cuts each span of the other.
    xp = spans.numpy_of(one.starts, two.starts)
    with_ids = one if one.query_ids is not None else two
    return Mask(
        xp.maximum(*spans.broadcast(one.starts, two.starts)),
        xp.minimum(*spans.broadcast(one.stops, two.stops)),
        with_ids.query_ids,
        with_ids.key_ids,
    )

  def __or__(self, other: "Mask") -> "Mask":
    """Keys that either allows. Both must have a single span and no ids."""
    for mask in (self, other):
      if mask.starts.shape[-2] > 1 or mask.query_ids is not None:
        raise ValueError("| combines masks of one span each and without ids")
    xp = spans.numpy_of(self.starts, other.starts)
    starts = xp.concatenate(spans.broadcast(self.starts, other.starts), axis=-2)
    stops = xp.concatenate(spans.broadcast(self.stops, other.stops), axis=-2)
    return Mask(*spans.disjoint(xp, starts, stops))


def full(num_queries: int, num_keys: int) -> Mask:
  """Every query attends to every key."""
  starts = np.zeros((1, num_queries), np.int32)
  return Mask(starts, np.full_like(starts, num_keys))


def causal(
    num_queries: int, num_keys: int | None = None, *, offset: Number = 0
) -> Mask:
  """Query t attends to the keys at positions <= t + offset.

  Args:
    num_queries: T.
    num_keys: S; T if None.
    offset: Position of the first query among the keys, [*B]. `num_keys -
      num_queries` aligns the last query with the last key.
  """
  num_keys = num_queries if num_keys is None else num_keys
  stops = (spans.positions(num_queries, offset) + 1).clip(0, num_keys)
  return _mask(spans.numpy_of(stops).zeros_like(stops), stops)


def sliding_window(
    num_queries: int,
    num_keys: int | None = None,
    *,
    window: Number,
    is_causal: bool = True,
    offset: Number = 0,
) -> Mask:
  """The last `window` keys up to the query; `window` on both sides if full.

  Args:
    num_queries: T.
    num_keys: S; T if None.
    window: Causal: the number of keys, the query's own position included.
      Otherwise the reach to either side, own position excluded. At least 1.
    is_causal: Whether later keys are hidden.
    offset: Position of the first query among the keys, [*B].
  """
  num_keys = num_queries if num_keys is None else num_keys
  positions = spans.positions(num_queries, offset)
  reach = spans.number("window", window, 1)[..., None]
  ndim = max(positions.ndim, reach.ndim)
  positions, reach = (spans.to_rank(x, ndim) for x in (positions, reach))
  # A causal window counts the query's own key, a window on both sides does not.
  starts = positions - (reach - 1 if is_causal else reach)
  stops = positions + (1 if is_causal else reach + 1)
  starts, stops = (x.clip(0, num_keys) for x in (starts, stops))
  return _mask(starts, stops)


def sinks(num_queries: int, num_keys: int, *, num_sinks: Number) -> Mask:
  """The first keys, for every query; `|` a window, `&` causal: StreamingLLM."""
  stops = spans.number("num_sinks", num_sinks, 0).clip(0, num_keys)
  xp = spans.numpy_of(stops)
  stops = xp.broadcast_to(stops[..., None], (*stops.shape, num_queries))
  return _mask(xp.zeros_like(stops), stops)


def streaming(
    num_queries: int,
    num_keys: int | None = None,
    *,
    window: Number,
    num_sinks: Number,
    offset: Number = 0,
) -> Mask:
  """Sinks and a causal window (https://arxiv.org/abs/2309.17453)."""
  num_keys = num_queries if num_keys is None else num_keys
  # Early queries stand before some sinks, which the causal mask hides from
  # them.
  near = sliding_window(num_queries, num_keys, window=window, offset=offset)
  return (sinks(num_queries, num_keys, num_sinks=num_sinks) | near) & causal(
      num_queries, num_keys, offset=offset
  )


def global_window(
    num_tokens: int,
    *,
    window: Number,
    num_global: Number,
    is_causal: bool = False,
) -> Mask:
  """A window, and global first tokens that see all and are seen by all.

  As in Longformer (https://arxiv.org/abs/2004.05150).
  """
  near = sliding_window(num_tokens, window=window, is_causal=is_causal)
  seen = sinks(num_tokens, num_tokens, num_sinks=num_global)
  either = near | seen
  starts, stops = either.starts, either.stops
  # A global row is one span of all keys; its second one is empty and stands at
  # the end, as `Mask` wants spans in order.
  xp = spans.numpy_of(starts)
  rows = spans.to_rank(xp.arange(num_tokens, dtype=xp.int32), starts.ndim)
  rows = rows < seen.stops
  first = xp.asarray([[0], [num_tokens]], xp.int32)
  first = spans.to_rank(first, starts.ndim)
  mask = Mask(
      xp.where(rows, first, starts), xp.where(rows, xp.int32(num_tokens), stops)
  )
  return mask & causal(num_tokens) if is_causal else mask


def document(
    segment_ids: Int[AnyArray, "*B T"], *, is_causal: bool = True
) -> Mask:
  """Attention inside documents; equal neighbouring ids are one document.

  Args:
    segment_ids: Ids of a packed sequence. A negative id is padding, which
      attends to nothing and to which nothing attends.
    is_causal: Whether later keys are hidden.
  """
  starts, stops = spans.runs(segment_ids)
  xp = spans.numpy_of(segment_ids)
  if is_causal:
    own = xp.arange(1, stops.shape[-1] + 1, dtype=xp.int32)
    stops = xp.minimum(stops, spans.to_rank(own, stops.ndim))
  # Padding attends to nothing; nothing attends to it, as no document holds it.
  stops = xp.where(xp.asarray(segment_ids) < 0, starts, stops)
  return _mask(starts, stops)


def block_causal_document(
    segment_ids: Int[AnyArray, "*B T"], *, block_size: Number
) -> Mask:
  """Documents in blocks; a token sees its block and those before it."""
  size = spans.number("block_size", block_size, 1)[..., None]
  mask = document(segment_ids, is_causal=False)
  xp = spans.numpy_of(segment_ids, size)
  first = mask.starts[..., 0, :]
  position = xp.arange(first.shape[-1], dtype=xp.int32)
  position = spans.to_rank(position, first.ndim)
  size = spans.to_rank(size, first.ndim)
  # Blocks are counted from where their document begins.
  block_end = first + ((position - first) // size + 1) * size
  stops = xp.minimum(mask.stops[..., 0, :], block_end)
  return _mask(first, stops)


def causal_blockwise(segment_ids: Int[AnyArray, "*B T"]) -> Mask:
  """Demonstrations see themselves alone, the last block sees everything before.

  The mask of in-context learning with independent examples.
  """
  mask = document(segment_ids)
  xp = spans.numpy_of(segment_ids)
  ids = xp.asarray(segment_ids)
  is_token = ids >= 0
  # The last token that is no padding says which block is asked last. It reads
  # all demonstrations, which do not read each other.
  last = ids.shape[-1] - 1 - is_token[..., ::-1].argmax(axis=-1)
  last_id = xp.take_along_axis(ids, last[..., None], axis=-1)
  is_last = ids == last_id
  first = is_token.argmax(axis=-1)[..., None].astype(xp.int32)
  mask = _mask(
      xp.where(is_last, first, mask.starts[..., 0, :]), mask.stops[..., 0, :]
  )
  # One span cannot leave out padding between demonstrations: ids do.
  if xp is np and not _has_gap(is_token):
    return mask
  return dataclasses.replace(
      mask,
      query_ids=xp.zeros_like(ids, xp.int32),
      key_ids=xp.where(is_token, 0, -1).astype(xp.int32),
  )


def share_question(
    segment_ids: Int[AnyArray, "*B T"], question_ids: Int[AnyArray, "*B T"]
) -> Mask:
  """Several answers to one question, each causal and blind to the others.

  Args:
    segment_ids: Ids of the pieces (a question, or one answer), in order.
    question_ids: The id of the question that a token belongs to; a question is
      its group's first piece.
  """
  xp = spans.numpy_of(segment_ids, question_ids)
  pieces, groups = xp.asarray(segment_ids), xp.asarray(question_ids)
  # Padding of either kind is padding.
  signed = pieces.astype(xp.promote_types(pieces.dtype, xp.int32))
  pieces = xp.where(groups < 0, -1, signed)
  own = document(pieces)
  group_start, group_stop = spans.runs(groups)
  _, piece_stop = spans.runs(pieces)
  # Of a group the first piece is the question, after padding if there is some:
  # it ends where that piece does.
  first = spans.next_true(pieces >= 0)
  start = xp.take_along_axis(first, group_start, axis=-1)
  inside = xp.minimum(start, piece_stop.shape[-1] - 1)
  stop = xp.take_along_axis(piece_stop, inside, axis=-1)
  stop = xp.where(pieces < 0, start, xp.minimum(stop, group_stop))
  question = _mask(start, stop) & causal(group_start.shape[-1])
  return own | question


def prefix_lm(num_tokens: int, *, prefix_len: Number) -> Mask:
  """Causal, but the first `prefix_len` keys are seen by every query."""
  length = spans.number("prefix_len", prefix_len, 0)[..., None]
  xp = spans.numpy_of(length)
  own = xp.arange(1, num_tokens + 1, dtype=xp.int32)
  stops = xp.maximum(spans.to_rank(own, length.ndim), length)
  stops = xp.minimum(stops, num_tokens)
  return _mask(xp.zeros_like(stops), stops)


def prefix_lm_document(
    segment_ids: Int[AnyArray, "*B T"], *, prefix_len: Number
) -> Mask:
  """Documents whose first `prefix_len` tokens all of the document sees."""
  whole = document(segment_ids, is_causal=False)
  own = document(segment_ids)
  length = spans.number("prefix_len", prefix_len, 0)[..., None, None]
  xp = spans.numpy_of(segment_ids, length)
  length = spans.to_rank(length, own.starts.ndim)
  # Short documents are shorter than their prefix: hence the minimum.
  stops = xp.maximum(own.stops, own.starts + length)
  return Mask(own.starts, xp.minimum(stops, whole.stops))


def query_key_sparse(
    keep_queries: Bool[AnyArray, "*B T"],
    keep_keys: Bool[AnyArray, "*B S"],
    *,
    is_causal: bool = True,
    offset: Number = 0,
) -> Mask:
  """Dropped queries and keys, as in the QK-sparse mask of FlashMask."""
  xp = spans.numpy_of(keep_queries, keep_keys)
  # Unequal ids, -1 and -2, so that dropped queries meet no dropped keys.
  query_ids = xp.where(xp.asarray(keep_queries), 0, -1)
  key_ids = xp.where(xp.asarray(keep_keys), 0, -2)
  return hash_sparse(query_ids, key_ids, is_causal=is_causal, offset=offset)


def hash_sparse(
    query_buckets: Int[AnyArray, "*B T"],
    key_buckets: Int[AnyArray, "*B S"],
    *,
    is_causal: bool = True,
    offset: Number = 0,
) -> Mask:
  """Queries meet keys of their hash bucket (https://arxiv.org/abs/2306.01160).

  Args:
    query_buckets: Bucket of each query.
    key_buckets: Bucket of each key.
    is_causal: Whether keys after the query's position are hidden.
    offset: Position of the first query among the keys.
  """
  # Spans say what may be seen at all, and ids which of that. Padding of queries
  # and that of keys do not meet.
  sizes = query_buckets.shape[-1], key_buckets.shape[-1]
  base = causal(*sizes, offset=offset) if is_causal else full(*sizes)
  xp = spans.numpy_of(query_buckets, key_buckets)
  query_ids, key_ids = xp.asarray(query_buckets), xp.asarray(key_buckets)
  return dataclasses.replace(
      base,
      query_ids=xp.where(query_ids < 0, -1, query_ids).astype(xp.int32),
      key_ids=xp.where(key_ids < 0, -2, key_ids).astype(xp.int32),
  )


def key_lengths(num_queries: int, lengths: Int[AnyArray, "B"]) -> Mask:
  """The first `lengths[b]` keys: sequences padded at their end."""
  xp = spans.numpy_of(lengths)
  stops = xp.asarray(lengths).astype(xp.int32)[:, None]
  stops = xp.broadcast_to(stops, (stops.shape[0], num_queries))
  return _mask(xp.zeros_like(stops), stops)


def allowed(mask: Mask, num_keys: int) -> Bool[AnyArray, "*B T S"]:
  """The mask as a dense array, for references and plots."""
  xp = numpy_of_mask(mask)
  keys = xp.arange(num_keys, dtype=xp.int32)
  starts, stops = mask.starts[..., None], mask.stops[..., None]
  keys = spans.to_rank(keys, starts.ndim)
  # [*B, P, T, S], reduced over the spans.
  inside = ((keys >= starts) & (keys < stops)).any(axis=-3)
  if mask.query_ids is None:
    return inside
  same_id = mask.query_ids[..., None] == mask.key_ids[..., None, :]
  ndim = max(inside.ndim, same_id.ndim)
  return spans.to_rank(inside, ndim) & spans.to_rank(same_id, ndim)


def numpy_of_mask(mask: Mask) -> types.ModuleType:
  """NumPy for a mask that is known while tracing, else jax.numpy."""
  return spans.numpy_of(*jax.tree.leaves(mask))


def _mask(starts: AnyArray, stops: AnyArray) -> Mask:
  xp = spans.numpy_of(starts, stops)
  return Mask(
      starts[..., None, :].astype(xp.int32),
      stops[..., None, :].astype(xp.int32),
  )


def _has_gap(is_token: np.ndarray) -> bool:
  """Whether there is padding between two tokens of a sequence."""
  seen = np.maximum.accumulate(is_token, axis=-1)
  coming = np.maximum.accumulate(is_token[..., ::-1], axis=-1)[..., ::-1]
  return bool((seen & coming & ~is_token).any())
