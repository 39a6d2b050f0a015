"""Which neurons and heads count for a token: what predictors learn.

A unit is a head, or a block of `block_size` neighbouring neurons. Its strength
for a token x is, of neurons with pre-activations z, activations h (what W_down
reads) and rows w of W_down,

  sign          max z: the block is active where it is positive, which for ReLU
                says exactly what may be left out
  magnitude     sqrt(sum h^2)
  contribution  sqrt(sum h^2 ||w||^2), how far it moves the residual stream

and of a head with output o the norm ||o||, or ||o W_out|| for `contribution`.
The positives are the active units for `sign` and the strongest for the others.
Deja Vu (https://arxiv.org/abs/2310.17157) has sign and ||o||.

Letters: F neurons, U units, N heads, H size of a head, D width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32
import numpy as np

from joma.inference.sparsity.contextual_config import Label


def unit_strengths(
    hidden_pre: Float[Array, "*b F"],
    hidden: Float[Array, "*b F"],
    down: Float[Array, "F D"],
    label: Label,
    block_size: int = 1,
) -> Float[Array, "*b U"]:
  """Strength of every block of neurons, float32.

  Args:
    hidden_pre: z, what the activation function reads.
    hidden: h.
    down: W_down.
    label: Which strength.
    block_size: Neurons of a block; divides F.
  """
  if label == "sign":
    return to_blocks(hidden_pre.astype(jnp.float32), block_size).max(axis=-1)
  hidden = hidden.astype(jnp.float32)
  if label == "contribution":
    norms = jnp.linalg.norm(down.astype(jnp.float32), axis=-1)
    hidden = hidden * norms.reshape((1,) * (hidden.ndim - 1) + (-1,))
  if block_size == 1:
    return jnp.abs(hidden)
  return jnp.sqrt(jnp.square(to_blocks(hidden, block_size)).sum(axis=-1))


def head_strengths(
    head_out: Float[Array, "*b N H"],
    out: Float[Array, "N H D"],
    label: Label,
) -> Float[Array, "*b N"]:
  """Strength of every head, float32: of its output, or of what that adds."""
  head_out = head_out.astype(jnp.float32)
  if label == "contribution":
    head_out = jnp.einsum("...NH,NHD->...ND", head_out, out.astype(jnp.float32))
  return jnp.linalg.norm(head_out, axis=-1)


def positives(
    strengths: Float[Array, "*b U"], label: Label, num_top: int | Array
) -> Bool[Array, "*b U"]:
  """The units that are active, or the `num_top` strongest of each row."""
  return strengths > 0 if label == "sign" else keep_top(strengths, num_top)


def keep_top(
    scores: Float[Array, "*b U"], num: int | Int[Array, ""]
) -> Bool[Array, "*b U"]:
  """Marks the `num` >= 1 largest of each row, the first of equal ones.

  Exact, many times faster than sorting, and `num` may be traced: the smallest
  score that is kept is found bit by bit, as the bits of floats, those of
  negative ones turned round, have their order.
  """
  bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
  top_bit = jnp.uint32(1 << 31)
  # Of negative floats those of larger bits are smaller: they are turned round,
  # and come before the others.
  bits = jnp.where(bits & top_bit, ~bits, bits | top_bit)

  def set_bit(
      i: Int[Array, ""] | int, least: UInt32[Array, "*b"]
  ) -> UInt32[Array, "*b"]:
    # From the highest bit down: it is set if enough scores are left above.
    trial = least | (top_bit >> jnp.asarray(i, jnp.uint32))
    num_above = (bits >= trial[..., None]).sum(axis=-1)
    return jnp.where(num_above >= num, trial, least)

  least = jnp.zeros(scores.shape[:-1], jnp.uint32)
  least = jax.lax.fori_loop(0, 32, set_bit, least)[..., None]
  is_equal = bits == least
  num_above = (bits > least).sum(axis=-1, keepdims=True)
  # Ties go to the first: exactly `num`, whatever is alike.
  return (bits > least) | (is_equal & (is_equal.cumsum(-1) + num_above <= num))


def to_blocks(x: Array, block_size: int) -> Array:
  """Splits the last axis: [..., F] to [..., U, block_size]."""
  return x.reshape(*x.shape[:-1], -1, block_size)


def unpack(
    packed: UInt8[np.ndarray, "*b P"], num_units: int
) -> Bool[np.ndarray, "*b U"]:
  """Undoes `jnp.packbits` along the last axis."""
  return np.unpackbits(packed, axis=-1, count=num_units).astype(bool)
