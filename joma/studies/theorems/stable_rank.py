"""Stable rank of the lower MLP layer falls and rises with attention.

JoMA predicts it for W of trained networks (https://arxiv.org/abs/2310.00535,
Figure 7). Here the reduced dynamics with F hidden nodes, derived from Theorem 1
(exp attention), whose logits are a sum over nodes:

  dV/dt = diag(e^{|v_l|^2 / 2}) (U - V),   V(0) = 0,

where row v_l [F] is what the nodes have of token l, and row mu_l of U what they
tend to; without attention dV/dt = U - V. Each row keeps its direction, v_l =
(1 - delta_l) mu_l, and delta_l obeys Theorem 4 with mu_l's length: salient
tokens come first, V is of few rows for a while, and its stable rank
|V|_F^2 / |V|_2^2 dips between two equal values, both U's. Without attention
it never changes. In float64.

Letters as in `joma.studies`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  import jaxtyping
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import drawing
  from joma.theory import convergence
  from joma.theory import flow
  from joma.theory import metrics
  from scansnap_jax.experiment import figures

_FIRST_TIME = 0.01
# A change in stable rank that is not rounding.
_CHANGE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableRankConfig:
  """Stable rank of the lower MLP layer: falls and rises with attention.

  Attributes:
    num_tokens: Number of tokens M.
    num_hidden: Number of hidden nodes F.
    salience_min: |mu_l| of the least salient token, positive.
    salience_max: |mu_l| of the most salient token, up to 6; tokens in between
      are equally spaced.
    end_time: Last time of the integration.
    num_times: Points of each curve, equally spaced in ln t from 0.01.
    num_seeds: Number of draws of the directions of the mu_l.
    first_seed: The seeds are first_seed, first_seed + 1, ...
  """

  num_tokens: int = 10
  num_hidden: int = 20
  salience_min: float = 1.0
  salience_max: float = 3.0
  end_time: float = 10.0
  num_times: int = 200
  num_seeds: int = 10
  first_seed: int = 0

  def __post_init__(self):
    require.between("num_tokens", self.num_tokens, 2, 1000)
    require.between("num_hidden", self.num_hidden, 2, 1000)
    require.positive("salience_min", self.salience_min)
    if not self.salience_min < self.salience_max <= 6:
      raise errors.UserError(
          f"salience_max must be above salience_min={self.salience_min:g} and"
          f" up to 6, got {self.salience_max}."
      )
    if not 0.01 < self.end_time <= 1e6:
      raise errors.UserError(
          f"end_time must be in (0.01, 1e6], got {self.end_time}."
      )
    require.between("num_times", self.num_times, 2, 10**5)
    settings_lib.require_seeds(self.first_seed, self.num_seeds)


def measure(
    config: StableRankConfig,
    *,
    on_metrics: study_lib.OnMetrics | None = None,
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
      summary[name] = _course(times, salience, targets, name == "with")
  curves = {"time": times}
  for name in ("with", "without"):
    curves[f"stable_rank_{name}"] = summary[name]["stable_rank"].mean(axis=0)
    curves[f"entropy_{name}"] = summary[name]["entropy"]
  study_lib.emit(on_metrics, range(config.num_times), curves)
  return {**summary, "finding": _finding(summary)}


def _course(
    times: jaxtyping.Float[np.ndarray, "S"],
    salience: jaxtyping.Float[np.ndarray, "M"],
    targets: jaxtyping.Float[jax.Array, "R M F"],
    has_attention: bool,
) -> dict[str, np.ndarray]:
  """Stable rank and entropy over time, from 0, of all draws of U."""
  gaps = convergence.integrate(
      jnp.append(0.0, times),
      *(jnp.asarray(salience), jnp.zeros(len(salience))),
      has_attention=has_attention,
  )[1:]
  lengths = convergence.components(gaps, jnp.asarray(salience))
  # Rows keep their direction, so that Theorem 4 of their lengths is the whole
  # solution; `integrate` is what tests hold it against.
  reached = -jnp.expm1(-gaps)
  layers = reached[None, :, :, None] * targets[:, None]
  return {
      "stable_rank": np.asarray(metrics.stable_rank(layers)),
      "entropy": np.asarray(convergence.attention_entropy(lengths, 2.0)),
  }


def draw_targets(
    seed: int, salience: jaxtyping.Float[np.ndarray, "M"], num_hidden: int
) -> jaxtyping.Float[jax.Array, "M F"]:
  """Draws U: rows of random direction and given length."""
  rows = np.random.default_rng(seed).normal(size=(len(salience), num_hidden))
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  return jnp.asarray(salience[:, None] * rows)


def integrate(
    times: jaxtyping.Float[jax.Array, "S"],
    targets: jaxtyping.Float[jax.Array, "M F"],
) -> jaxtyping.Float[jax.Array, "S M F"]:
  """Integrates dV/dt itself from 0, without use of Theorem 4."""

  def slope(
      v: jaxtyping.Float[jax.Array, "M F"], _: jaxtyping.Float[jax.Array, ""]
  ) -> jaxtyping.Float[jax.Array, "M F"]:
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


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws stable rank and attention entropy against time."""
  times = np.asarray(summary["times"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.6)
    left, right = figure.subplots(1, 2)
    for name, look in (("with", drawing.WITH), ("without", drawing.WITHOUT)):
      label = f"{name} attention"
      ranks = np.asarray(summary[name]["stable_rank"])
      figures.draw_band(left, times, ranks, look, label)
      drawing.draw_curve(right, times, summary[name]["entropy"], look, label)
    left.set(ylabel=r"stable rank $\|V\|_F^2/\|V\|_2^2$", ylim=(1, None))
    right.set(ylabel="attention entropy (nats)", ylim=(0, None))
    for axes in (left, right):
      axes.set(xlabel="time $t$", xscale="log", xlim=(times[0], times[-1]))
    figures.put_legend_above(figure, figures.legend_entries(left))
  return figure


STUDY = study_lib.Study(
    title="Stable rank of the lower MLP layer",
    config=StableRankConfig(),
    measure=study_lib.streamed("stable_rank", measure),
    draw=draw,
    caption=(
        "Stable rank of the lower layer (mean and sample standard deviation"
        " over draws of its targets) and entropy of attention, with attention"
        " that follows the MLP and with frozen attention."
    ),
)
