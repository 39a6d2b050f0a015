"""What the statistics of a rung's data say of its tokens, without any training.

Lemma 1 of Scan & Snap (https://arxiv.org/abs/2305.16380) at Z = 0, where f is a
context's counts over their norm, and with a decoder that has taken one step
(**derived here**):

  Y = E[f (e_n - alpha)^T],   dz_m/dt = E[f o (I - f f^T) Y (e_n - alpha); m].

At the very start nothing is known, and alpha is 1 / M. Settled, it is the best
prediction that there is without the context, P(n), or P(n|m) where the residual
knows the query: the form of `joma.inference.bridge.theory`. Half of the samples
make Y and the other half meets it, and the other way round. An optimizer that
takes each coordinate by its size goes along dz over its root mean square, batch
by batch (Adam), or along the mean of its sign.

Letters: B samples of a batch, C tokens of a context, M tokens, S batches.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from joma.studies.systems.bridge import training
from scansnap_jax import dynamics

# Occurrences by which what is said of a rare token is drawn to the mean.
_PSEUDO = 64.0


class Statistics(NamedTuple):
  """Of a source.

  Attributes:
    velocity: dz_ml/dt at the very start, row m of query m.
    settled: The same once alpha is what is known without the context.
    over_size: The same of a batch, over its root mean square.
    sign: Mean sign of it, batch by batch.
    frequency: P(l) in contexts.
    ratio: Mean of P(l|n) / P(l) over the next tokens that follow l.
    log_ratio: Mean of its logarithm.
    query_probs: P(m).
  """

  velocity: Float[np.ndarray, "M M"]
  settled: Float[np.ndarray, "M M"]
  over_size: Float[np.ndarray, "M M"]
  sign: Float[np.ndarray, "M M"]
  frequency: Float[np.ndarray, "M"]
  ratio: Float[np.ndarray, "M"]
  log_ratio: Float[np.ndarray, "M"]
  query_probs: Float[np.ndarray, "M"]


def measure(
    batches: training.Batches, num_tokens: int, *, has_residual: bool
) -> Statistics:
  """Measures samples.

  Args:
    batches: [S, B, ...], two batches or more.
    num_tokens: M.
    has_residual: Let the settled alpha know the query.
  """
  uniform = jnp.full((num_tokens, num_tokens), 1 / num_tokens)
  mean, square, sign = _crossed(batches, uniform)
  settled, _, _ = _crossed(batches, _alpha(batches, num_tokens, has_residual))
  context, query, label = (np.asarray(x) for x in batches)
  count = lambda ids: np.bincount(ids.ravel(), minlength=num_tokens)
  return Statistics(
      velocity=mean,
      settled=settled,
      over_size=mean / np.sqrt(np.maximum(square, 1e-30)),
      sign=sign,
      frequency=count(context) / context.size,
      query_probs=count(query) / query.size,
      **ratios(
          context.reshape(-1, context.shape[-1]), label.ravel(), num_tokens
      ),
  )


def _crossed(
    batches: training.Batches, alpha: Float[Array, "M M"]
) -> list[Float[np.ndarray, "M M"]]:
  """Moments of each half's velocity by the other half's decoder, their mean."""
  halves = [jax.tree.map(lambda x, i=i: x[i::2], batches) for i in range(2)]
  decoders = [_decoder(half, alpha) for half in halves]
  moments = [
      _moments(half, alpha, decoder)
      for half, decoder in zip(halves, decoders[::-1], strict=True)
  ]
  return [
      (np.asarray(there, np.float64) + np.asarray(back, np.float64)) / 2
      for there, back in zip(*moments, strict=True)
  ]


def ratios(
    context: Int[np.ndarray, "B C"],
    label: Int[np.ndarray, "B"],
    num_tokens: int,
) -> dict[str, Float[np.ndarray, "M"]]:
  """Means of P(l|n) / P(l) and of its logarithm, over P(n|l).

  P(n|l) is drawn to P(n) by some occurrences of l; of a token that is never
  seen the ratio is 1.
  """
  pairs = context.astype(np.int64) * num_tokens + label[:, None]
  joint = np.bincount(pairs.ravel(), minlength=num_tokens**2)
  joint = joint.reshape(num_tokens, num_tokens)
  prior = joint.sum(axis=0) / joint.sum()
  rows = joint + _PSEUDO * prior
  nexts = rows / rows.sum(axis=1, keepdims=True)
  ratio = nexts / np.where(prior > 0, prior, 1)
  logs = np.log(np.where(ratio > 0, ratio, 1))
  return {
      "ratio": (nexts * ratio).sum(axis=1),
      "log_ratio": (nexts * logs).sum(axis=1),
  }


def _alpha(
    batches: training.Batches, num_tokens: int, has_residual: bool
) -> Float[Array, "M M"]:
  """P(n|m), row m; without the residual P(n) in every row."""
  query, label = (np.asarray(x).ravel() for x in batches[1:])
  pairs = query.astype(np.int64) * num_tokens + label
  joint = np.bincount(pairs, minlength=num_tokens**2).astype(np.float64)
  joint = joint.reshape(num_tokens, num_tokens)
  prior = joint.sum(axis=0, keepdims=True) / joint.sum()
  rows = joint + prior if has_residual else np.repeat(prior, num_tokens, axis=0)
  return jnp.asarray(rows / rows.sum(axis=1, keepdims=True), jnp.float32)


def _parts(
    batch: training.Batches, alpha: Float[Array, "M M"]
) -> tuple[Float[Array, "B M"], Float[Array, "B M"]]:
  """Returns f at Z = 0, and e_n - alpha."""
  rows = jnp.arange(len(batch.query))[:, None]
  counts = jnp.zeros((len(rows), len(alpha))).at[rows, batch.context].add(1)
  error = jax.nn.one_hot(batch.label, len(alpha)) - alpha[batch.query]
  return dynamics.l2_normalize(counts), error


@jax.jit
def _decoder(
    batches: training.Batches, alpha: Float[Array, "M M"]
) -> Float[Array, "M M"]:
  def add(total: Array, batch: training.Batches) -> tuple[Array, None]:
    features, error = _parts(batch, alpha)
    return total + features.T @ error / len(features), None

  total = jax.lax.scan(add, jnp.zeros_like(alpha), batches)[0]
  return total / len(batches.query)


@jax.jit
def _moments(
    batches: training.Batches,
    alpha: Float[Array, "M M"],
    decoder: Float[Array, "M M"],
) -> tuple[Array, Array, Array]:
  """Mean, mean square and mean sign of a batch's velocity."""

  def add(
      totals: tuple[Array, ...], batch: training.Batches
  ) -> tuple[tuple[Array, ...], None]:
    velocity = batch_velocity(batch, alpha, decoder)
    found = (velocity, jnp.square(velocity), jnp.sign(velocity))
    return jax.tree.map(jnp.add, totals, found), None

  zero: Any = (jnp.zeros_like(alpha),) * 3
  totals = jax.lax.scan(add, zero, batches)[0]
  return jax.tree.map(lambda x: x / len(batches.query), totals)


def batch_velocity(
    batch: training.Batches,
    alpha: Float[Array, "M M"],
    decoder: Float[Array, "M M"],
) -> Float[Array, "M M"]:
  """dz/dt of a batch, by Lemma 1 at Z = 0."""
  features, error = _parts(batch, alpha)
  back = error @ decoder.T
  inner = (features * back).sum(axis=1, keepdims=True)
  rows = features * (back - features * inner)
  total = jnp.zeros_like(alpha).at[batch.query].add(rows)
  return total / len(features)


def scores(
    found: Statistics,
    context: Int[np.ndarray, "B C"],
    queries: Int[np.ndarray, "B Q"],
) -> dict[str, Float[np.ndarray, "B C"]]:
  """What each predictor says of the places of contexts.

  Args:
    found: Of the data.
    context: Tokens.
    queries: Who will ask; those that go by the query take their mean.

  Returns:
    By name. "velocity", "settled velocity", "velocity over size" and "sign of
    velocity" go by the queries; "velocity by type", sum_m P(m) dz_ml/dt, and
    all others do not.
  """
  asked = functools.partial(_asked, context, queries)
  by_type = found.query_probs @ found.velocity
  return {
      "frequency": found.frequency[context],
      "minus frequency": -found.frequency[context],
      "ratio": found.ratio[context],
      "log ratio": found.log_ratio[context],
      "velocity by type": by_type[context],
      "velocity": asked(found.velocity),
      "settled velocity": asked(found.settled),
      "velocity over size": asked(found.over_size),
      "sign of velocity": asked(found.sign),
  }


def _asked(
    context: Int[np.ndarray, "B C"],
    queries: Int[np.ndarray, "B Q"],
    table: Float[np.ndarray, "M M"],
) -> Float[np.ndarray, "B C"]:
  return table[queries[:, :, None], context[:, None, :]].mean(axis=1)
