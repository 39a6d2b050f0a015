"""Figure 4 of JoMA: attention gets sparse, then dense again.

  v <- v + eta (mu - v) o softmax(v^2 / T)

from one value for all components (https://arxiv.org/abs/2310.00535). Salient
components, those with large mu, get there first; the entropy of the attention
softmax(v^2 / T) falls meanwhile, and rises when the others follow. Nothing is
random: with the paper's mu the trajectory is one set of numbers.

Paper's settings: softmax attention at a temperature of 3, mu as published (the
authors' code).

Letters as in `joma.studies`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from joma.theory import published
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.theory import convergence
  from scansnap_jax.experiment import figures

_TABLED = (0, 100, 300, 500, 1000, 2000, 4999)
_CURVE_POINTS = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure4Config:
  """Reduced dynamics of a nonlinear MLP with attention (Figure 4).

  Attributes:
    mu: What each component tends to, positive. The default is the paper's.
    initial: First value of every component, below every mu.
    temperature: T of the attention softmax(v^2 / T).
    step_size: Step size eta of the iteration.
    num_steps: Number of steps of the iteration.
  """

  mu: tuple[float, ...] = published.FIGURE4_MU
  initial: float = 0.05
  temperature: float = 3.0
  step_size: float = 0.02
  num_steps: int = 5000

  def __post_init__(self):
    settings_lib.require_targets(self.mu, self.initial)
    require.positive("temperature", self.temperature)
    require.positive("step_size", self.step_size)
    require.between("num_steps", self.num_steps, 1, 10**6)


def measure(
    config: Figure4Config,
    *,
    on_metrics: study_lib.OnMetrics | None = None,
) -> dict[str, Any]:
  """Iterates the map in float32.

  Args:
    config: The settings.
    on_metrics: Called with the step and the entropy before it.

  Returns:
    `min_entropy` and `min_step`, over the steps; `entropy_at` some of them (by
    the step as text), each before its update; `v_final` [J], after the last
    update; `mu`; for the figure `curve`: steps, v [S, J] and entropy [S] before
    each; and the finding.
  """
  path = _iterate(config)
  entropy = path.entropy[:-1]
  # Rounded up: at most that many points, whatever the number of steps.
  every = -(-config.num_steps // _CURVE_POINTS)
  shown = np.arange(0, config.num_steps, every)
  study_lib.emit(on_metrics, shown, {"entropy": entropy[shown]})
  summary = {
      "min_entropy": float(entropy.min()),
      "min_step": int(entropy.argmin()),
      "entropy_at": {
          str(step): float(entropy[step])
          for step in _TABLED
          if step < config.num_steps
      },
      "v_final": path.v[-1],
      "mu": list(config.mu),
      "curve": {
          "steps": shown,
          "v": path.v[shown],
          "entropy": entropy[shown],
      },
  }
  ends = float(entropy[0]), float(entropy[-1])
  return {**summary, "finding": _finding(summary, *ends)}


def _iterate(config: Figure4Config) -> convergence.ReducedPath:
  """The state before each step and after the last, on the host."""
  iterate = lambda mu: convergence.figure4_path(
      mu,
      initial=config.initial,
      temperature=config.temperature,
      step_size=config.step_size,
      num_steps=config.num_steps,
  )
  return jax.device_get(jax.jit(iterate)(jnp.array(config.mu, jnp.float32)))


def _finding(summary: dict[str, Any], first: float, last: float) -> str:
  least, step = summary["min_entropy"], summary["min_step"]
  if least < min(first, last):
    course = (
        f"falls from {first:.4f} to {least:.5f} at step {step} and rises again"
        f" to {last:.4f}"
    )
  else:
    course = f"goes from {first:.4f} to {last:.4f} without a minimum between"
  return f"The entropy of attention {course}."


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws components towards mu, and the entropy of attention."""
  curve, mu = summary["curve"], np.asarray(summary["mu"])
  steps, v = np.asarray(curve["steps"]), np.asarray(curve["v"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.6)
    left, right = figure.subplots(1, 2)
    shades = np.linspace(0.75, 0.0, len(mu))
    for j, shade in enumerate(shades):
      left.plot(steps, v[:, j], color=str(shade))
    left.set(
        xlabel="step",
        ylabel="component $v_j$",
        xlim=(0, steps[-1]),
        ylim=(0, 1.05 * mu.max()),
    )
    goals = left.secondary_yaxis("right")
    goals.set_yticks(mu, [])
    goals.set_ylabel(r"$\mu_j$", rotation=0, labelpad=4)
    goals.tick_params(length=6, width=1)
    right.plot(steps, curve["entropy"], color="black")
    least, place = summary["min_entropy"], summary["min_step"]
    right.plot([place], [least], "o", color="#D55E00", markersize=5)
    right.annotate(
        f"{least:.4f} at step {place}",
        (place, least),
        (8, -3),
        textcoords="offset points",
        va="top",
    )
    right.set(
        xlabel="step",
        ylabel="attention entropy (nats)",
        xlim=(0, steps[-1]),
        ylim=(0, 1.05 * np.log(len(mu))),
    )
  return figure


STUDY = study_lib.Study(
    title="Figure 4: attention gets sparse, then dense",
    config=Figure4Config(),
    measure=study_lib.streamed("figure4", measure),
    draw=draw,
    caption=(
        "Reduced dynamics with attention. Left: components on their way to μ_j"
        " (ticks on the right); right: entropy of attention, and its minimum."
    ),
)
