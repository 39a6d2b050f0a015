"""Probes of attention maps.

Of weights a_ts of one head and one text, T queries:

  sinks          1 if the first key's mean weight over the queries that see it,
                 sum_t a_t0 / T, is above .3
  sink_of_means  1 where that mean, over texts too, is: another number
  concentration  Frobenius norm of the map, 1 / sqrt of the keys read if even
  diversity      1 - cosine of two heads' maps, mean over all pairs of a layer
  local          weight on a query's own key and the N before it, N = 0 ... 3

The first two are the metrics of When Attention Sink Emerges
(https://arxiv.org/abs/2410.10781) and of `joma.transformer.probes`; the rest
are indicators of Deconstructing Attention (https://arxiv.org/abs/2510.11602).
Weights without row sums are divided by them first, which makes a proxy.

Letters: B texts, T queries, S keys, N heads.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

SINK_THRESHOLD = 0.3
NUM_LOCAL = 4


def first_mass(
    weights: Float[Array, "B N T S"], num_queries: Float[Array, "B"]
) -> Float[Array, "B N"]:
  """Mean weight of the first key."""
  return weights[..., 0].sum(axis=2) / num_queries[:, None]


def sinks(
    weights: Float[Array, "B N T S"], num_queries: Float[Array, "B"]
) -> Float[Array, "B N"]:
  """1 where the first key is a sink."""
  mass = first_mass(weights, num_queries)
  # A mass that is no number is no sink either.
  return jnp.where(jnp.isnan(mass), mass, mass > SINK_THRESHOLD)


def concentration(
    weights: Float[Array, "B N T S"], num_queries: Float[Array, "B"]
) -> Float[Array, "B N"]:
  """Frobenius norm of a map over that of one key a query."""
  squares = jnp.square(weights).sum(axis=(2, 3))
  return jnp.sqrt(squares / num_queries[:, None])


def diversity(
    weights: Float[Array, "B N T S"], num_queries: Float[Array, "B"]
) -> Float[Array, "B"]:
  """How far heads' maps are from each other; 0 of one head alone."""
  num_heads = weights.shape[1]
  if num_heads == 1:
    return jnp.zeros_like(num_queries)
  flat = weights.reshape(*weights.shape[:2], -1)
  flat = flat / jnp.linalg.norm(flat, axis=-1, keepdims=True)
  cosine = jnp.einsum("bnx,bmx->bnm", flat, flat)
  others = cosine.sum(axis=(1, 2)) - num_heads
  return 1 - others / (num_heads * (num_heads - 1))


def local(
    weights: Float[Array, "B N T S"], num_queries: Float[Array, "B"]
) -> Float[Array, "B N 4"]:
  """Weight on the last 1 to 4 keys; queries that see fewer have all."""
  queries, keys = (jnp.arange(size) for size in weights.shape[2:])
  back = queries[:, None] - keys[None]
  near = back[None] < 1 + jnp.arange(NUM_LOCAL)[:, None, None]
  share = jnp.einsum("BNTS,FTS->BNF", weights, near.astype(weights.dtype))
  return share / num_queries[:, None, None]


# Of each text; `sink_of_means` is a threshold on the mean of its values.
PROBES: Mapping[str, Callable[[Array, Array], Array]] = {
    "sinks": sinks,
    "sink_of_means": first_mass,
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


def text_sums(
    names: tuple[str, ...],
    weights: Float[Array, "B N T S"],
    is_token: Bool[Array, "B T"],
) -> dict[str, Float[Array, "*b"]]:
  """Sums values of probes over texts, those without a token left out.

  Args:
    names: In `PROBES`.
    weights: Of one layer, rows that sum to 1.
    is_token: Which queries are no padding.

  Returns:
    Of each name [N], `diversity` [] and `local` [N, 4].
  """
  weights = jnp.where(is_token[:, None, :, None], weights, 0)
  weights = weights.astype(jnp.float32)
  num_queries = is_token.sum(axis=1).astype(jnp.float32)
  has_tokens = num_queries > 0
  found = {}
  for name in names:
    values = PROBES[name](weights, num_queries)
    has = has_tokens.reshape(-1, *(1,) * (values.ndim - 1))
    found[name] = jnp.where(has, values, 0).sum(axis=0)
  return found


def of_mean(name: str, mean: Array) -> Array:
  """A probe's value, of the mean over texts of what `PROBES` gives of each."""
  if name != "sink_of_means":
    return mean
  return jnp.where(jnp.isnan(mean), mean, mean > SINK_THRESHOLD)


def of_maps(
    names: tuple[str, ...],
    weights: Float[Array, "B N T S"],
    normalize: bool = True,
) -> dict[str, Float[Array, "*b"]]:
  """Values of probes on a layer's maps, means over texts.

  Args:
    names: In `PROBES`.
    weights: Of whole texts.
    normalize: Whether rows are divided by their sums. What learned keys take
      is not the text's: its weights are left as they are.
  """
  weights = weights.astype(jnp.float32)
  weights = with_row_sums(weights) if normalize else weights
  is_token = jnp.ones((weights.shape[0], weights.shape[2]), bool)
  total = jax.jit(text_sums, static_argnums=0)(names, weights, is_token)
  # By the names given: what jit returns of a dict is sorted.
  return {name: of_mean(name, total[name] / len(weights)) for name in names}


def prefix_matching(weights: Float[Array, "B N T T"]) -> Float[Array, "B N"]:
  """Weight on the key behind an earlier occurrence of the query's token.

  Of texts that stand twice, T / 2 tokens each time, mean over the second: the
  score of induction heads (https://arxiv.org/abs/2209.11895).
  """
  period = weights.shape[2] // 2
  queries = jnp.arange(period, 2 * period)
  behind = weights[:, :, queries, queries - period + 1]
  return behind.mean(axis=-1)
