"""A recording as text: streams of bytes, compressed, in base64.

A head's stream holds arrays one behind the other, T tokens and n keys in all:

  counts     2 T   keys of each query, low bytes, then high bytes
  rests      T     what a query gives to all other keys, as a level
  received   T     a token's share of all attention, as a level
  marks      T     1 is a sink, 2 a heavy hitter
  shares     P T   of a query's attention, what a policy still has, in 255ths
  gaps       2 n   keys in rising order, each less the one before it
  levels     n     their weights

`levels` says what a level stands for. Gaps of dense rows are all 1 and cost
nothing once compressed, so that one form serves dense and sparse maps.

Letters: L layers, N query heads, T tokens, E keys of a query, P policies, W
width of a picture.
"""

import base64
from collections.abc import Iterator
from typing import NamedTuple
import zlib

from jaxtyping import Float, Integer, UInt8
import numpy as np

from joma.inference.explore import levels as levels_lib
from joma.inference.explore import recording

# Of a head's small picture, at most.
PICTURE_WIDTH = 32
# Rounds in which a page that is too large drops small weights.
_NUM_ROUNDS = 6


class Streams(NamedTuple):
  """What the page reads.

  Attributes:
    heads: Of each layer and head, in this order.
    pictures: Levels [L, N, W, W], each the largest of its part of a map.
    left_at: Of each policy `Evictions.left_at`, low bytes, then high bytes.
    least_level: Weights of a level below it are not stored.
    num_entries: E; a query that has so many keys may have left others out.
    width: W.
  """

  heads: tuple[str, ...]
  pictures: str
  left_at: tuple[str, ...]
  least_level: int
  num_entries: int
  width: int


def pack(found: recording.Recording, max_bytes: float) -> Streams:
  """Compresses a recording.

  Args:
    found: What was measured.
    max_bytes: Of all heads' streams in base64. Where they are larger, the
      smallest weights are left out, of all heads alike.
  """
  codes = levels_lib.encode(found.attention.weights)
  compress = lambda least: tuple(
      map(_compressed, _head_streams(found, codes, least))
  )
  heads, least = compress(1), 1
  for _ in range(_NUM_ROUNDS):
    size = sum(map(len, heads))
    if size <= max_bytes:
      break
    least = _less(codes, least, max_bytes / size)
    heads = compress(least)
  width = min(PICTURE_WIDTH, codes.shape[2])
  return Streams(
      heads,
      _compressed(_pictures(found.attention, codes, width).tobytes()),
      tuple(_compressed(_planes(one.left_at)) for one in found.policies),
      least,
      codes.shape[-1],
      width,
  )


def _less(codes: UInt8[np.ndarray, "L N T E"], least: int, share: float) -> int:
  """The least level of which a bit less than that share of weights is left."""
  numbers = np.bincount(codes.ravel(), minlength=256)
  left = numbers[::-1].cumsum()[::-1]  # Weights at or above each level.
  wanted = 0.96 * share * left[least]
  return max(int(np.argmax(left <= wanted)), least + 1)


def _head_streams(
    found: recording.Recording,
    codes: UInt8[np.ndarray, "L N T E"],
    least: int,
) -> Iterator[bytes]:
  attention = found.attention
  num_tokens = codes.shape[2]
  marks = attention.sinks() + 2 * attention.heavy().astype(np.uint8)
  received = levels_lib.encode(attention.received / num_tokens)
  shares = np.rint(255 * attention.shares.clip(0, 1)).astype(np.uint8)
  for layer, head in np.ndindex(codes.shape[:2]):
    at = (layer, head)
    entries = _entries(attention.keys[at], codes[at], least)
    is_stored = codes[at] >= least
    stored = np.where(is_stored, attention.weights[at], 0).sum(axis=-1)
    rests = np.clip(attention.totals[at] - stored, 0, 1)
    yield b"".join((
        _planes(is_stored.sum(axis=-1)),
        levels_lib.encode(rests).tobytes(),
        received[at].tobytes(),
        marks[at].astype(np.uint8).tobytes(),
        shares[:, layer, head].tobytes(),
        *entries,
    ))


def _entries(
    keys: Integer[np.ndarray, "T E"],
    codes: UInt8[np.ndarray, "T E"],
    least: int,
) -> tuple[bytes, bytes]:
  """Gaps and levels of the weights that are stored."""
  order = np.argsort(keys, axis=-1)
  keys = np.take_along_axis(keys, order, axis=-1).astype(np.int32)
  codes = np.take_along_axis(codes, order, axis=-1)
  rows, columns = np.nonzero(codes >= least)
  stored = keys[rows, columns]
  gaps = np.diff(stored, prepend=0)
  is_first = np.diff(rows, prepend=-1) > 0
  gaps = np.where(is_first, stored, gaps)
  return _planes(gaps), codes[rows, columns].tobytes()


def _pictures(
    attention: recording.Attention,
    codes: UInt8[np.ndarray, "L N T E"],
    width: int,
) -> UInt8[np.ndarray, "L N W W"]:
  """The largest weight of each part of a map; queries run down."""
  num_tokens = codes.shape[2]
  rows = np.arange(num_tokens) * width // num_tokens
  places = rows[:, None] * width + attention.keys.astype(np.int64) * width // (
      num_tokens
  )
  found = np.zeros((*codes.shape[:2], width * width), np.uint8)
  for at in np.ndindex(codes.shape[:2]):
    np.maximum.at(found[at], places[at].ravel(), codes[at].ravel())
  return found.reshape(*codes.shape[:2], width, width)


def _planes(values: Integer[np.ndarray, "*b"]) -> bytes:
  """Whole numbers below 2^16, low bytes first, then all high bytes."""
  values = np.asarray(values, np.uint16)
  return (values & 255).astype(np.uint8).tobytes() + (
      (values >> 8).astype(np.uint8).tobytes()
  )


def _compressed(data: bytes) -> str:
  return base64.b64encode(zlib.compress(data, 6)).decode()


def unpack(
    stream: str, num_tokens: int, num_policies: int
) -> dict[str, Float[np.ndarray, "*b"]]:
  """Reads a head's stream, as the page does.

  Args:
    stream: Of `Streams.heads`.
    num_tokens: T.
    num_policies: P.

  Returns:
    `weights`, the map [T, T], 0 where nothing is stored; `rests`, `received`
    and `marks` [T]; `shares` [P, T].
  """
  data = np.frombuffer(zlib.decompress(base64.b64decode(stream)), np.uint8)
  sizes = [2, *(1,) * (3 + num_policies)]
  fixed, entries = np.split(data, [sum(sizes) * num_tokens])
  counts = _whole(fixed[: 2 * num_tokens])
  rests, received, marks, *shares = np.split(
      fixed[2 * num_tokens :], 3 + num_policies
  )
  gaps = _whole(entries[: 2 * counts.sum()]).astype(np.int64)
  rows = np.repeat(np.arange(num_tokens), counts)
  starts = np.repeat(np.cumsum(counts) - counts, counts)
  total = np.cumsum(gaps)
  keys = total - np.where(starts > 0, total[starts - 1], 0)
  weights = np.zeros((num_tokens, num_tokens))
  weights[rows, keys] = levels_lib.decode(entries[2 * counts.sum() :])
  return {
      "weights": weights,
      "rests": levels_lib.decode(rests),
      "received": levels_lib.decode(received),
      "marks": marks,
      "shares": np.array(shares).reshape(num_policies, num_tokens) / 255,
  }


def _whole(planes: UInt8[np.ndarray, "*b"]) -> Integer[np.ndarray, "*c"]:
  low, high = np.split(planes.astype(np.int64), 2)
  return low + 256 * high
