"""The loss of each token, and positions a piece at a time.

The logits of B texts of T tokens are B T V numbers, of which a step of training
holds several arrays: of long texts and large vocabularies more than all the
rest. In pieces they are made, turned into losses, and made once more in the
backward pass.

Letters: B batch, T positions, V vocabulary, C pieces, S positions of a piece.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


@jax.custom_vjp
def token_losses(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
  """Cross-entropy of each token in nats.

  Its gradient, softmax minus one-hot, is one pass over the logits; that of an
  indexed read would scatter into an array of their size.
  """
  return _token_losses(logits, targets)[0]


def _token_losses(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> tuple[Array, tuple[Array, Array, Array]]:
  lse = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return lse - picked, (logits, lse, targets)


def _token_losses_backward(
    residuals: tuple[Array, Array, Array], cotangents: Float[Array, "B T"]
) -> tuple[Array, None]:
  logits, lse, targets = residuals
  # A comparison with a counter fuses with the rest; a one-hot array would be
  # one more of the logits' size.
  vocabulary = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2)
  is_target = vocabulary == targets[..., None]
  error = jnp.exp(logits - lse[..., None]) - is_target
  return error * cotangents[..., None], None


token_losses.defvjp(_token_losses, _token_losses_backward)


def into_pieces(
    x: Shaped[Array, "B T *D"], size: int, num_parts: int = 1
) -> Shaped[Array, "C B S *D"]:
  """Cuts positions into pieces, each with as much of every part.

  Args:
    x: An array whose positions lie in parts one behind the other.
    size: Positions of a piece, over all parts; the last piece is filled up.
    num_parts: Devices that hold the positions; divides T.
  """
  batch, length, *rest = x.shape
  each = max(size // num_parts, 1)
  x = x.reshape(batch, num_parts, length // num_parts, *rest)
  count = -(-x.shape[2] // each)
  widths = [(0, 0)] * x.ndim
  widths[2] = (0, count * each - x.shape[2])
  x = jnp.pad(x, widths).reshape(batch, num_parts, count, each, *rest)
  return jnp.moveaxis(x, 2, 0).reshape(count, batch, num_parts * each, *rest)


def out_of_pieces(
    pieces: Shaped[Array, "C B S *D"], length: int, num_parts: int = 1
) -> Shaped[Array, "B T *D"]:
  """Undoes `into_pieces` of `length` positions."""
  count, batch, size, *rest = pieces.shape
  each = size // num_parts
  x = pieces.reshape(count, batch, num_parts, each, *rest)
  x = jnp.moveaxis(x, 0, 2).reshape(batch, num_parts, count * each, *rest)
  x = x[:, :, : length // num_parts]
  return x.reshape(batch, length, *rest)
