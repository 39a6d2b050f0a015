"""Probes of attention maps and residual streams, by name.

Of weights a_ts of one head and one text, T queries:

  sinks          share of texts in which the first key's mean weight over the
                 queries that see it, sum_t a_t0 / T, is above .3
  sink of means  1 where that mean, over texts too, is: another number
  concentration  Frobenius norm of the map, 1 / sqrt of the keys read if even
  diversity      1 - cosine of two heads' maps, mean over all pairs of a layer
  local          weight on a query's own key and the N before it, N = 0 ... 3

The first two are the metrics of When Attention Sink Emerges
(https://arxiv.org/abs/2410.10781) and of `joma.transformer.probes`; the rest
are indicators of Deconstructing Attention (https://arxiv.org/abs/2510.11602).
Weights without row sums are divided by them first, which makes a proxy.

Letters: B texts, T queries, S keys, N heads, L layers, D width.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

SINK_THRESHOLD = 0.3
NUM_LOCAL = 4
SINK_COSINE = 0.9


def sinks(weights: Float[Array, "B N T S"]) -> Float[Array, "N"]:
  """Share of texts whose first key is a sink."""
  mass = weights[..., 0].mean(axis=2)
  return (mass > SINK_THRESHOLD).mean(axis=0)


def sink_of_means(weights: Float[Array, "B N T S"]) -> Float[Array, "N"]:
  """1 where the first key is a sink on the mean of texts, else 0."""
  mass = weights[..., 0].mean(axis=(0, 2))
  return (mass > SINK_THRESHOLD).astype(jnp.float32)


def concentration(weights: Float[Array, "B N T S"]) -> Float[Array, "N"]:
  """Frobenius norm of a map over that of one key a query, mean over texts."""
  squares = jnp.square(weights).sum(axis=(2, 3)) / weights.shape[2]
  return jnp.sqrt(squares).mean(axis=0)


def diversity(weights: Float[Array, "B N T S"]) -> Float[Array, ""]:
  """How far heads' maps are from each other; 0 of one head alone."""
  flat = weights.reshape(*weights.shape[:2], -1)
  flat = flat / jnp.linalg.norm(flat, axis=-1, keepdims=True)
  cosine = jnp.einsum("bnx,bmx->bnm", flat, flat)
  num_heads = weights.shape[1]
  if num_heads == 1:
    return jnp.zeros(())
  others = cosine.sum(axis=(1, 2)) - num_heads
  return 1 - (others / (num_heads * (num_heads - 1))).mean()


def local(weights: Float[Array, "B N T S"]) -> Float[Array, "N 4"]:
  """Weight on the last 1 to 4 keys; queries that see fewer have all."""
  queries, keys = (jnp.arange(size) for size in weights.shape[2:])
  back = queries[:, None] - keys[None]
  near = back[None] < 1 + jnp.arange(NUM_LOCAL)[:, None, None]
  share = jnp.einsum("BNTS,FTS->NF", weights, near.astype(weights.dtype))
  return share / (weights.shape[0] * weights.shape[2])


PROBES: Mapping[str, Callable[[Array], Array]] = {
    "sinks": sinks,
    "sink_of_means": sink_of_means,
    "concentration": concentration,
    "diversity": diversity,
    "local": local,
}


def with_row_sums(
    weights: Float[Array, "B N T S"],
) -> Float[Array, "B N T S"]:
  """Divides by row sums; rows of nothing stay 0."""
  total = weights.sum(axis=-1, keepdims=True)
  return weights / jnp.where(total == 0, 1.0, total)


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


def secondary_sinks(
    resid: Float[np.ndarray, "L T D"], *, cosine: float = SINK_COSINE
) -> list[SecondarySink]:
  """Finds tokens whose residual stream is the first one's, or its opposite.

  Only from the largest rise of the first token's norm to its largest fall; the
  first three positions are left out (https://arxiv.org/abs/2512.22213).

  Args:
    resid: The stream of one text before each layer and after the last.
    cosine: Of a token and the first, in size, from which it counts.
  """
  resid = np.asarray(resid, np.float64)
  norms = np.linalg.norm(resid, axis=-1)
  change = np.diff(norms[:, 0])
  rise = int(np.argmax(change)) + 1
  fall = int(np.argmin(change)) + 1
  stop = fall if fall > rise else len(resid)
  along = np.einsum("ltd,ld->lt", resid, resid[:, 0])
  alike = np.abs(along) > cosine * norms * norms[:, :1]
  found = []
  for position in range(3, resid.shape[1]):
    layers = np.flatnonzero(alike[rise:stop, position])
    if layers.size:
      runs = np.split(layers, np.flatnonzero(np.diff(layers) > 1) + 1)
      longest = max(runs, key=len)
      found.append(
          SecondarySink(position, rise + int(longest[0]), len(longest))
      )
  return found


def update_rank(
    now: Float[np.ndarray, "I O"],
    start: Float[np.ndarray, "I O"],
    share: float = 0.9,
) -> int:
  """Singular values that hold a share of |now - start|^2; 0 if it is 0."""
  values = np.linalg.svd(np.asarray(now) - np.asarray(start), compute_uv=False)
  held = np.cumsum(np.square(values, dtype=np.float64))
  if held[-1] == 0:
    return 0
  return int(np.searchsorted(held, share * held[-1])) + 1


def of_maps(
    names: tuple[str, ...], weights: Float[Array, "B N T S"]
) -> dict[str, Float[Array, "*b"]]:
  """Values of probes, by their names in `PROBES`, on a layer's maps."""
  weights = with_row_sums(weights.astype(jnp.float32))
  return {name: jax.jit(PROBES[name])(weights) for name in names}
