"""Blocks of R tokens as codes of four bits, as the op reads them.

  key   = offset + scale code, of each channel of a block
  value = offset + scale code, of each token

Keys stand with a row a channel, values with a row a token: as the factors that
they are. Two codes share a byte, those of the first half of the rows are the
low ones. KIVI (https://arxiv.org/abs/2402.02750) with groups of a whole block
of keys and a whole value.

Letters: B batch, K key and value heads, M blocks, R tokens of a block, H head
size.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import array_types

_LEVELS = 15
# What a group of numbers with a scale in common runs over.
Over = Literal["tokens", "channels"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("data", "scale", "offset"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Blocks:
  """Coded keys or values.

  Attributes:
    data: uint8, of keys [B, M, K, H / 2, R], of values [B, M, K, R / 2, H].
    scale: Of keys [B, M, K, H], of values [B, M, K, R].
    offset: As scale.
  """

  data: array_types.Leaf
  scale: array_types.Leaf
  offset: array_types.Leaf


def encode(
    x: Float[Array, "B M K R H"], over: Over, dtype: jax.typing.DTypeLike
) -> Blocks:
  """Returns the codes of whole blocks.

  Args:
    x: Keys, or values.
    over: tokens for keys, whose channels have a scale each; channels for
      values.
    dtype: Of scales and offsets.
  """
  axis = -2 if over == "tokens" else -1
  x = x.astype(jnp.float32)
  offset = x.min(axis=axis)
  scale = (x.max(axis=axis) - offset) / _LEVELS
  # As they are kept: codes then make up for what storing has rounded.
  offset, scale = offset.astype(dtype), scale.astype(dtype)
  wide = lambda y: jnp.expand_dims(y.astype(jnp.float32), axis)
  steps = (x - wide(offset)) / jnp.maximum(wide(scale), 1e-30)
  found = jnp.clip(jnp.round(steps), 0, _LEVELS).astype(jnp.uint8)
  found = found.swapaxes(-1, -2) if over == "tokens" else found
  low, high = jnp.split(found, 2, axis=-2)
  return Blocks(low | (high << 4), scale, offset)


def decode(blocks: Blocks, over: Over) -> Float[Array, "B M K R H"]:
  """Returns the keys or values, float32."""
  axis = -2 if over == "tokens" else -1
  both = blocks.data & 15, blocks.data >> 4
  found = jnp.concatenate(both, axis=-2).astype(jnp.float32)
  found = found.swapaxes(-1, -2) if over == "tokens" else found
  wide = lambda y: jnp.expand_dims(y.astype(jnp.float32), axis)
  return wide(blocks.offset) + wide(blocks.scale) * found
