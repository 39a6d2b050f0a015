"""Theorem 2 of JoMA: linear activation, the winner takes all.

With one hidden node, exp attention and zero initial values

  dv/dt = Delta o e^{v^2 / 2}:   erf(v_l / sqrt 2) / Delta_l = sqrt(2 / pi) t

for every token l (https://arxiv.org/abs/2310.00535). At t* = sqrt(pi / 2) /
max |Delta| the winner is infinite; the others freeze at
sqrt 2 erfinv(Delta_l / max |Delta|). The flow is integrated without use of the
law (`winner.integrate`) and held against it, with v / sqrt 2 and with v / 2, as
the paper is remembered to have it. In float64.

Letters as in `joma.studies`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from etils import epy

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
  from joma.theory import winner
  from scansnap_jax.experiment import figures

# The clock runs to |v_w| = 9, where 2e-19 of the time is left.
_END_OF_CLOCK = 9.0
_TOLERANCE = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErfConfig:
  """Theorem 2: linear activation, winner takes all.

  Attributes:
    delta: Delta_l = E[g x_l] of each token, none zero, the largest in absolute
      value only once.
    shown_until: Share of the blow-up time at which curves end, below 1.
    num_times: Points of each curve.
  """

  delta: tuple[float, ...] = (1.0, 0.8, 0.5, 0.1)
  shown_until: float = 0.98
  num_times: int = 197

  def __post_init__(self):
    sizes = sorted(map(abs, self.delta))
    if len(sizes) < 2 or not sizes[0] > 0 or not math.isfinite(sizes[-1]):
      raise errors.UserError(
          "delta needs two or more finite numbers, none of them 0; got"
          f" {self.delta}."
      )
    if sizes[-2] == sizes[-1]:
      raise errors.UserError(
          "One token of delta must be the largest in absolute value, got"
          f" {self.delta}."
      )
    if not 0 < self.shown_until < 1:
      raise errors.UserError(
          f"shown_until must be between 0 and 1, got {self.shown_until}."
      )
    require.between("num_times", self.num_times, 2, 10**5)


def measure(
    config: ErfConfig,
    *,
    on_metrics: study_lib.OnMetrics | None = None,
) -> dict[str, Any]:
  """Integrates the flow and compares both forms of the law.

  Args:
    config: The settings.
    on_metrics: Called with the place of each time and the ratios' spread.

  Returns:
    `times` as shares of the measured blow-up time, up to `shown_until`; `v`
    and `ratio`, erf(v / sqrt 2) / Delta, and `ratio_of_halves` with v / 2, [S,
    M]; `blow_up_time` and `frozen` (those that lose [M - 1]), measured and by
    the law; `largest_error` of the law; and the finding.
  """
  with jax.enable_x64(True):
    delta = jnp.array(config.delta)
    loses = np.abs(delta) < np.abs(delta).max()
    law_time = float(winner.blow_up_time(delta))
    times, v = winner.integrate(_clock(config), delta)
    ratio = np.asarray(winner.erf_ratio(v[:-1], delta))
    # The same function at v / sqrt 2 is the law with v / 2.
    halves = np.asarray(winner.erf_ratio(v[:-1] / math.sqrt(2), delta))
    times, v = np.asarray(times), np.asarray(v)
    frozen_law = np.asarray(winner.frozen_components(delta))[loses]
  expected = math.sqrt(2 / math.pi) * times[:-1, None]
  summary = {
      "delta": list(config.delta),
      "times": times[:-1] / times[-1],
      "v": v[:-1],
      "ratio": ratio,
      "ratio_of_halves": halves,
      "blow_up_time": {"measured": float(times[-1]), "law": law_time},
      "frozen": {"measured": v[-1][loses], "law": frozen_law},
      "largest_error": max(
          float(np.abs(ratio - expected).max()),
          abs(float(times[-1]) / law_time - 1),
          float(np.abs(v[-1][loses] - frozen_law).max()),
      ),
  }
  curves = {
      "time": summary["times"],
      "spread": np.ptp(ratio, axis=1),
      "spread_of_halves": np.ptp(halves, axis=1),
  }
  study_lib.emit(on_metrics, range(config.num_times), curves)
  return {**summary, "finding": _finding(summary)}


def _clock(config: ErfConfig) -> jaxtyping.Float[jax.Array, "S"]:
  """The winner's value at each of the times, by the law, and at the end.

  The law only spaces the points: the times that come out are the flow's own.
  """
  shares = np.linspace(0, config.shown_until, config.num_times)
  clock = np.sqrt(2) * jax.scipy.special.erfinv(jnp.asarray(shares))
  return jnp.append(clock, _END_OF_CLOCK)


def _finding(summary: dict[str, Any]) -> str:
  error = summary["largest_error"]
  verb = "holds" if error < _TOLERANCE else "fails"
  halves = summary["ratio_of_halves"][-1] / summary["ratio"][-1]
  return (
      f"The erf law with v/√2 {verb} (largest error {error:.0e}): all tokens"
      f" share one ratio, {summary['ratio'][-1].min():.4f} to"
      f" {summary['ratio'][-1].max():.4f} at the last time shown, and the"
      f" winner blows up at t = {summary['blow_up_time']['measured']:.4f}; with"
      f" v/2 they disagree by a factor {halves.max() / halves.min():.2f}."
  )


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws components, and both forms of the erf relation."""
  times, v = np.asarray(summary["times"]), np.asarray(summary["v"])
  delta = summary["delta"]
  looks = drawing.looks(len(delta))
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.7)
    grown, good, bad = figure.subplots(1, 3, sharex=True)
    good.sharey(bad)
    for j, look in enumerate(looks):
      for axes, values in (
          (grown, v),
          (good, np.asarray(summary["ratio"])),
          (bad, np.asarray(summary["ratio_of_halves"])),
      ):
        label = rf"$\Delta_l={delta[j]:g}$"
        drawing.draw_curve(axes, times, values[:, j], look, label)
    losers = np.abs(delta) < np.abs(delta).max()
    for j, height in zip(
        np.flatnonzero(losers), summary["frozen"]["measured"], strict=True
    ):
      grown.axhline(
          height, color=looks[j].color, linestyle=":", linewidth=0.8, zorder=1
      )
    for axes in (good, bad):
      line = np.sqrt(2 / np.pi) * times * summary["blow_up_time"]["measured"]
      axes.plot(times, line, "k-", linewidth=0.6, zorder=3)
    grown.set(ylabel="component $v_l$", title="components")
    good.set(title=r"$\mathrm{erf}(v_l/\sqrt{2})\,/\,\Delta_l$")
    bad.set(title=r"$\mathrm{erf}(v_l/2)\,/\,\Delta_l$")
    for axes in (grown, good, bad):
      axes.set(xlabel="time / blow-up time", xlim=(0, 1))
    figures.put_legend_above(figure, figures.legend_entries(grown))
  return figure


STUDY = study_lib.Study(
    title="Theorem 2: the erf relation",
    config=ErfConfig(),
    measure=study_lib.streamed("erf", measure),
    draw=draw,
    caption=(
        "Theorem 2. Left: components until shortly before the blow-up of the"
        " winner; dotted: where the others freeze. Middle and right: erf / Δ_l"
        " of every token, with v/√2, where all fall on √(2/π) t (black), and"
        " with v/2."
    ),
)
