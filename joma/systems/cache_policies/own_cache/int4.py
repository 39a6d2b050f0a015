"""Vectors of four-bit codes, with a scale and an offset for each group.

  x = offset + scale code,   code in 0 .. 15

offset is the least of a group, scale a fifteenth of its range; what comes back
is off by half a scale at most. Two codes share a byte: those of the first half
of the channels are the low ones.

Letters: n tokens, g numbers of a group, H channels.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.inference.cache import storage

_LEVELS = 15
# A group runs over tokens, channel by channel, or over channels of a token.
Over = Literal["tokens", "channels"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
  """Coded vectors [..., n, H].

  Attributes:
    data: uint8 [..., n, H / 2].
    scale: Of groups: [..., n / g, H] over tokens, [..., n, H / g] over
      channels.
    offset: As scale.
  """

  data: storage.Leaf
  scale: storage.Leaf
  offset: storage.Leaf


def empty(
    shape: tuple[int, ...],
    over: Over,
    size: int,
    dtype: jax.typing.DTypeLike,
) -> Codes:
  """Returns codes of zeros.

  Args:
    shape: Of the vectors [..., n, H], H even.
    over: What a group runs over.
    size: g, a divisor of n or H.
    dtype: Of scales and offsets.
  """
  *lead, num_tokens, num_channels = shape
  groups = (num_tokens // size, num_channels)
  if over == "channels":
    groups = (num_tokens, num_channels // size)
  zeros = lambda: jnp.zeros((*lead, *groups), dtype)
  data = jnp.zeros((*lead, num_tokens, num_channels // 2), jnp.uint8)
  return Codes(data, zeros(), zeros())


def encode(
    x: Float[Array, "... n H"],
    over: Over,
    size: int,
    dtype: jax.typing.DTypeLike,
) -> Codes:
  """Returns the codes of vectors; arguments as in `empty`."""
  axis = -2 if over == "tokens" else -1
  grouped = _grouped(x.astype(jnp.float32), over, size)
  offset = grouped.min(axis=axis)
  scale = (grouped.max(axis=axis) - offset) / _LEVELS
  # As they are kept: codes then make up for what storing has rounded.
  offset, scale = offset.astype(dtype), scale.astype(dtype)
  wide = lambda y: jnp.expand_dims(y.astype(jnp.float32), axis)
  # A group of equal numbers has scale 0, and codes of 0.
  steps = (grouped - wide(offset)) / jnp.maximum(wide(scale), 1e-30)
  codes = jnp.clip(jnp.round(steps), 0, _LEVELS).astype(jnp.uint8)
  low, high = jnp.split(codes.reshape(x.shape), 2, axis=-1)
  return Codes(low | (high << 4), scale, offset)


def decode(codes: Codes, over: Over, size: int) -> Float[Array, "... n H"]:
  """Returns the vectors, float32."""
  both = (codes.data & 15, codes.data >> 4)
  found = jnp.concatenate(both, axis=-1).astype(jnp.float32)
  axis = -2 if over == "tokens" else -1
  wide = lambda y: jnp.expand_dims(y.astype(jnp.float32), axis)
  grouped = _grouped(found, over, size)
  grouped = wide(codes.offset) + wide(codes.scale) * grouped
  return grouped.reshape(found.shape)


def _grouped(x: Array, over: Over, size: int) -> Array:
  """[..., n / g, g, H] over tokens, [..., n, H / g, g] over channels."""
  *lead, num_tokens, num_channels = x.shape
  if over == "tokens":
    return x.reshape(*lead, num_tokens // size, size, num_channels)
  return x.reshape(*lead, num_tokens, num_channels // size, size)
