"""Documents of a mask, for mixers that read all that comes before a token.

Letters: B batch, T tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from joma.transformer import hooks
from kernels_pallas import masks
from scansnap_jax.experiment import errors


class Documents(NamedTuple):
  """Where documents begin.

  Attributes:
    starts: Bool [B, T]; None where each text is one document.
    is_followed: Of masks that are known only as the program runs, whether they
      say no more than that; None for the others, which are checked already.
  """

  starts: Bool[Array, "B T"] | None
  is_followed: Bool[Array, ""] | None = None

  def since(self) -> Int[Array, "B T"] | None:
    """Tokens of its document before each; None where each text is one."""
    if self.starts is None:
      return None
    place = jnp.arange(self.starts.shape[1])[None]
    begun = jax.lax.cummax(jnp.where(self.starts, place, 0), axis=1)
    return place - begun

  def checked(self, out: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """What is given if the mask is one that could be followed, else NaN."""
    if self.is_followed is None:
      return out
    return jnp.where(self.is_followed, out, jnp.nan)


def of_mask(
    name: str, call: hooks.Call, mask: masks.Mask, batch_size: int
) -> Documents:
  """Reads the documents off a causal mask.

  Padding at the ends of texts needs no mask: nothing before it sees it.

  Args:
    name: Of the mixer, for the message.
    call: Of the layer.
    mask: `masks.causal`, or `masks.document` of the sequences.
    batch_size: B.

  Raises:
    UserError: If the mask says more, or the layer has a window.
  """
  if call.options.window or mask.query_ids is not None:
    raise _refusal(name, call)
  if mask.starts.shape[-2] != 1:
    raise _refusal(name, call)
  first, stop = mask.starts[..., 0, :], mask.stops[..., 0, :]
  place = np.arange(first.shape[-1])[(None,) * (first.ndim - 1)]
  begins = (first == place) | (place == 0)
  if all(isinstance(leaf, np.ndarray) for leaf in (first, stop)):
    if not _fits(first, stop, begins, place).all():
      raise _refusal(name, call)
    if not begins[..., 1:].any():
      return Documents(None)
    is_followed = None
  else:
    is_followed = jnp.asarray(_fits(first, stop, begins, place).all())
  shape = (batch_size, begins.shape[-1])
  starts = jnp.broadcast_to(masks.to_rank(jnp.asarray(begins), 2), shape)
  return Documents(starts, is_followed)


def _fits(
    first: masks.AnyArray,
    stop: masks.AnyArray,
    begins: masks.AnyArray,
    place: masks.AnyArray,
) -> masks.AnyArray:
  """Whether each token sees its document up to itself, or, padding, nothing."""
  if isinstance(begins, np.ndarray):
    since = np.maximum.accumulate(np.where(begins, place, 0), axis=-1)
  else:
    begun = jnp.where(begins, place, 0)
    since = jax.lax.cummax(begun, axis=begun.ndim - 1)
  return ((first == since) & (stop == place + 1)) | (first >= stop)


def _refusal(name: str, call: hooks.Call) -> errors.UserError:
  return errors.UserError(
      f"{name} reads all that comes before a token: layer {call.layer} can"
      " follow no window and no mask but the causal one, of whole texts or of"
      " documents."
  )
