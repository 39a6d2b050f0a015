"""Stable rank of the lower MLP layer falls and rises with attention.

JoMA predicts it for W of trained networks (https://arxiv.org/abs/2310.00535,
Figure 7). Here the reduced dynamics with K hidden nodes, derived from Theorem 1
(exp attention), whose logits are a sum over nodes:

  dV/dt = diag(e^{|v_l|^2 / 2}) (U - V),   V(0) = 0,

where row v_l [K] is what the nodes have of token l, and row mu_l of U what they
tend to; without attention dV/dt = U - V. Each row keeps its direction, v_l =
(1 - delta_l) mu_l, and delta_l obeys Theorem 4 with mu_l's length: salient
tokens come first, V is of few rows for a while, and its stable rank
|V|_F^2 / |V|_2^2 dips between two equal values, both U's. Without attention
it never changes. In float64.

Letters: R seeds, S times, M tokens, K hidden nodes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from joma import config as config_lib
from joma.theory import convergence
from joma.theory import flow
from joma.theory import metrics

_FIRST_TIME = 0.01
# A change in stable rank that is not rounding.
_CHANGE = 1e-6


def measure(
    config: config_lib.StableRankConfig,
    *,
    on_metrics: Callable[[int, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
  """Integrates both equations for several draws of U.

  Args:
    config: The settings.
    on_metrics: Called with the place of each time and the means over seeds.

  Returns:
    `times` [S]; for `with` and `without` attention: `stable_rank` [R, S] and
    `entropy` of attention softmax(|v_l|^2 / 2) [S], the same for all seeds;
    `target`, the stable rank of U [R]; and the finding.
  """
  times = np.geomspace(_FIRST_TIME, config.end_time, config.num_times)
  salience = np.linspace(
      config.salience_max, config.salience_min, config.num_tokens
  )
  with jax.enable_x64(True):
    targets = jnp.stack([
        draw_targets(config.first_seed + i, salience, config.num_hidden)
        for i in range(config.num_seeds)
    ])
    summary: dict[str, Any] = {
        "times": times,
        "salience": salience,
        "target": np.asarray(metrics.stable_rank(targets)),
    }
    for name in ("with", "without"):
      gaps = convergence.integrate(
          jnp.append(0.0, times),
          *(jnp.asarray(salience), jnp.zeros(config.num_tokens)),
          has_attention=name == "with",
      )[1:]
      lengths = convergence.components(gaps, jnp.asarray(salience))
      reached = -jnp.expm1(-gaps)
      layers = reached[None, :, :, None] * targets[:, None]
      summary[name] = {
          "stable_rank": np.asarray(metrics.stable_rank(layers)),
          "entropy": np.asarray(convergence.attention_entropy(lengths, 2.0)),
      }
  if on_metrics is not None:
    for i, time in enumerate(times.tolist()):
      row: dict[str, Any] = {"time": time}
      for name in ("with", "without"):
        row[f"stable_rank_{name}"] = summary[name]["stable_rank"][:, i].mean()
        row[f"entropy_{name}"] = summary[name]["entropy"][i]
      on_metrics(i, row)
  return {**summary, "finding": _finding(summary)}


def draw_targets(
    seed: int, salience: Float[np.ndarray, "M"], num_hidden: int
) -> Float[Array, "M K"]:
  """Draws U: rows of random direction and given length."""
  rows = np.random.default_rng(seed).normal(size=(len(salience), num_hidden))
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  return jnp.asarray(salience[:, None] * rows)


def integrate(
    times: Float[Array, "S"], targets: Float[Array, "M K"]
) -> Float[Array, "S M K"]:
  """Integrates dV/dt itself from 0, without use of Theorem 4."""

  def slope(v, _):
    attention = jnp.exp(jnp.sum(v**2, axis=1, keepdims=True) / 2)
    return attention * (targets - v)

  return flow.solve(slope, jnp.zeros_like(targets), times)


def _finding(summary: dict[str, Any]) -> str:
  rank = summary["with"]["stable_rank"]
  least, target = rank.min(axis=1), summary["target"]
  dips = least < np.minimum(rank[:, 0], rank[:, -1]) - _CHANGE
  spread = np.ptp(summary["without"]["stable_rank"], axis=1).max()
  still = "does not change" if spread < _CHANGE else f"changes by {spread:.2g}"
  return (
      f"With attention the stable rank dips in {dips.sum()} of {len(dips)}"
      f" draws: from {rank[:, 0].mean():.2f} to {least.mean():.2f} and back to"
      f" {rank[:, -1].mean():.2f} (means; {target.mean():.2f} is that of the"
      f" targets). Without attention it {still}."
  )
