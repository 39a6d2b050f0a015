"""Secondary sinks: tokens that become like the first one for some layers.

Between the largest rise of the first token's norm and its largest fall, a token
whose residual stream h has |cos(h, h_0)| > .9 is one; the first three positions
are left out (https://arxiv.org/abs/2512.22213).

Letters: B texts, L layers, M = L + 1 boundaries of layers, T tokens, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

SINK_COSINE = 0.9
_FIRST_POSITION = 3


class SecondarySink(NamedTuple):
  """A token that is like the first one for some layers.

  Attributes:
    position: Its place in the text.
    first_layer: First layer boundary at which it is, 0 before any layer.
    length: How many boundaries in a row.
  """

  position: int
  first_layer: int
  length: int


class Runs(NamedTuple):
  """Of every token the longest run of boundaries at which it is like the first.

  Attributes:
    start: Where it begins; of equal ones the first.
    length: Boundaries in a row; 0 where there is none.
  """

  start: Int[Array, "B T"]
  length: Int[Array, "B T"]


def runs(resid: Float[Array, "B M T D"], cosine: float = SINK_COSINE) -> Runs:
  """Finds the runs of all texts.

  Args:
    resid: The stream before each layer and after the last.
    cosine: Of a token and the first, in size, from which it counts.
  """
  resid = resid.astype(jnp.float32)
  norms = jnp.linalg.norm(resid, axis=-1)
  change = jnp.diff(norms[:, :, 0], axis=1)
  rise = jnp.argmax(change, axis=1) + 1
  fall = jnp.argmin(change, axis=1) + 1
  stop = jnp.where(fall > rise, fall, resid.shape[1])
  layers = jnp.arange(resid.shape[1])[None]
  is_between = (layers >= rise[:, None]) & (layers < stop[:, None])
  along = jnp.einsum("BLTD,BLD->BLT", resid, resid[:, :, 0])
  alike = jnp.abs(along) > cosine * norms * norms[:, :, :1]
  alike &= is_between[:, :, None]
  alike &= (jnp.arange(resid.shape[2]) >= _FIRST_POSITION)[None, None]

  def step(
      length: Int[Array, "B T"], is_alike: Bool[Array, "B T"]
  ) -> tuple[Array, Array]:
    length = jnp.where(is_alike, length + 1, 0)
    return length, length

  zero = jnp.zeros((resid.shape[0], resid.shape[2]), jnp.int32)
  _, lengths = jax.lax.scan(step, zero, alike.swapaxes(0, 1))
  length = lengths.max(axis=0)
  return Runs(jnp.argmax(lengths, axis=0) - length + 1, length)


def text_sums(
    resid: Float[Array, "B M T D"], is_token: Bool[Array, "B T"]
) -> Float[Array, "L"]:
  """Secondary sinks that begin behind each layer, summed over texts."""
  found = runs(resid)
  # Boundary 0 is before the first layer; nothing rises there.
  layers = jnp.arange(1, resid.shape[1])[:, None, None]
  begins = (found.start[None] == layers) & (found.length > 0)[None]
  return (begins & is_token[None]).sum(axis=(1, 2)).astype(jnp.float32)


def secondary_sinks(
    resid: Float[np.ndarray, "M T D"], *, cosine: float = SINK_COSINE
) -> list[SecondarySink]:
  """Finds the secondary sinks of one text, by position.

  Args:
    resid: As in `runs`.
    cosine: Likewise.
  """
  start, length = (
      np.asarray(leaf[0]) for leaf in runs(jnp.asarray(resid)[None], cosine)
  )
  return [
      SecondarySink(int(t), int(start[t]), int(length[t]))
      for t in np.flatnonzero(length)
  ]
