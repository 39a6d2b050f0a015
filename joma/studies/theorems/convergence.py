"""Theorem 4 of JoMA: salient components converge first.

  L_j / L_k = e^{(mu_j^2 - mu_k^2) / 2} (1 + Lambda_jk),   L = ln(1 / delta),
  Lambda_jk = lambda_jk e^{mu_k^2 / 2} / L_k,

for neighbours j, k of falling mu (https://arxiv.org/abs/2310.00535). The paper
bounds lambda; that it tends to a constant, and to which, is derived in
`joma.theory.convergence`. In float64 and in L: the gaps delta underflow.

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
  from scansnap_jax.experiment import figures

_FIRST_TIME = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvergenceConfig:
  """Theorem 4: salient components converge first.

  Attributes:
    mu: What each component tends to: positive, up to 6, from large to small.
    initial: First value of every component, below every mu.
    end_time: Last time of the integration.
    num_times: Points of each curve, equally spaced in ln t from 0.01.
  """

  mu: tuple[float, ...] = (3.0, 2.0, 1.0)
  initial: float = 0.01
  end_time: float = 256.0
  num_times: int = 120

  def __post_init__(self):
    settings_lib.require_targets(self.mu, self.initial)
    if list(self.mu) != sorted(self.mu, reverse=True) or self.mu[0] > 6:
      raise errors.UserError(
          "mu must fall from one component to the next and not exceed 6, where"
          f" e^(mu^2 / 2) is 6.6e7; got {self.mu}."
      )
    if not 0.01 < self.end_time <= 1e6:
      raise errors.UserError(
          f"end_time must be in (0.01, 1e6], got {self.end_time}."
      )
    require.between("num_times", self.num_times, 2, 10**5)


def measure(
    config: ConvergenceConfig,
    *,
    on_metrics: study_lib.OnMetrics | None = None,
) -> dict[str, Any]:
  """Integrates L and compares the ratios with their limits.

  Args:
    config: The settings.
    on_metrics: Called with the place of each time and the ratios.

  Returns:
    `times` [S]; `log_inverse_gap` L, with and without attention [S, J]; for
    each pair of neighbours, [J - 1] or [S, J - 1]: `ratio`, `ratio_limit`,
    `lambda`, `lambda_limit`; and the finding.
  """
  mu = np.array(config.mu)
  # In float64, as lambda is what is left of a ratio that has nearly reached its
  # limit.
  with jax.enable_x64(True):
    times = np.geomspace(_FIRST_TIME, config.end_time, config.num_times)
    start = jnp.full(len(mu), config.initial)
    gaps, gaps_without = (
        convergence.integrate(
            *(jnp.append(0.0, times), jnp.asarray(mu), start),
            has_attention=has_attention,
        )[1:]
        for has_attention in (True, False)
    )
    pairs = [_compare(config, gaps, j) for j in range(len(mu) - 1)]
    gaps, gaps_without = np.asarray(gaps), np.asarray(gaps_without)
  ratio, ratio_limit, lambda_, lambda_limit = map(
      np.array, zip(*pairs, strict=True)
  )
  summary = {
      "mu": list(config.mu),
      "times": times,
      "log_inverse_gap": {"with": gaps, "without": gaps_without},
      "ratio": ratio.T,
      "ratio_limit": ratio_limit,
      "lambda": lambda_.T,
      "lambda_limit": lambda_limit,
  }
  curves = {f"ratio_{j}_{j + 1}": ratio[j] for j in range(len(ratio))}
  study_lib.emit(on_metrics, range(len(times)), {"time": times, **curves})
  return {**summary, "finding": _finding(summary)}


def _compare(
    config: ConvergenceConfig, gaps: jaxtyping.Float[jax.Array, "S J"], j: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Ratio, its limit, lambda and its limit, of a component and the next one."""
  gap_j, gap_k = gaps[:, j], gaps[:, j + 1]
  pair = config.mu[j], config.mu[j + 1]
  return (
      gap_j / gap_k,
      convergence.ratio_limit(*pair),
      convergence.measured_lambda(gap_j, gap_k, *pair),
      convergence.lambda_limit(*pair, config.initial, config.initial),
  )


def _finding(summary: dict[str, Any]) -> str:
  last, limit = summary["ratio"][-1], summary["ratio_limit"]
  mu = summary["mu"]
  pairs = [
      f"{last[j]:.3f} for mu {mu[j]:g} : {mu[j + 1]:g} (limit {limit[j]:.3f})"
      for j in range(len(limit))
  ]
  # Lambda_jk falls as 1 / L_k, which grows for ever: 2 % is near for the times
  # of the defaults.
  is_near = np.abs(last / limit - 1).max() < 0.02
  verb = "reach their limits" if is_near else "are still far from their limits"
  without = summary["log_inverse_gap"]["without"][-1]
  return (
      f"The ratios of ln(1/delta) {verb} by t = {summary['times'][-1]:g}:"
      f" {', '.join(pairs)}; without attention they are"
      f" {', '.join(f'{r:.3f}' for r in without[:-1] / without[1:])}."
  )


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws gaps in logarithms, their ratios and lambda."""
  times, mu = np.asarray(summary["times"]), summary["mu"]
  gaps = {n: np.asarray(x) for n, x in summary["log_inverse_gap"].items()}
  looks = drawing.looks(len(mu))
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.7)
    left, middle, right = figure.subplots(1, 3)
    for j, look in enumerate(looks):
      solid = look._replace(linestyle="-")
      label = rf"$\mu_j={mu[j]:g}$"
      drawing.draw_curve(left, times, gaps["with"][:, j], solid, label)
      dashed = dict(linestyle=(0, (4, 2)), linewidth=0.8)
      left.plot(times, gaps["without"][:, j], color=look.color, **dashed)
    left.plot([], [], "--", color="black", linewidth=0.8, label="without")
    left.set(ylabel=r"$\ln(1/\delta_j)$", yscale="log", title="gaps")
    for axes, name, title in (
        (middle, "ratio", r"$\ln(1/\delta_j)\,/\,\ln(1/\delta_k)$"),
        (right, "lambda", r"$\lambda_{jk}$"),
    ):
      values, limits = np.asarray(summary[name]), summary[f"{name}_limit"]
      for j, look in enumerate(looks[:-1]):
        axes.axhline(limits[j], color="black", linewidth=0.8, linestyle="--")
        solid = look._replace(linestyle="-")
        label = rf"$\mu_j,\mu_k={mu[j]:g},{mu[j + 1]:g}$"
        drawing.draw_curve(axes, times, values[:, j], solid, label)
      axes.set(title=title)
    for axes in (left, middle, right):
      axes.set(xlabel="time $t$", xscale="log", xlim=(times[0], times[-1]))
      axes.legend()
  return figure


STUDY = study_lib.Study(
    title="Theorem 4: salient components first",
    config=ConvergenceConfig(),
    measure=study_lib.streamed("convergence", measure),
    draw=draw,
    caption=(
        "Theorem 4. Left: gaps δ_j = 1 − v_j / μ_j, as ln(1/δ_j), with (lines)"
        " and without attention (dashed). Middle: ratios of neighbours and"
        " their limits (dashed). Right: λ and its limits (dashed)."
    ),
)
