"""The figures of JoMA's studies (https://arxiv.org/abs/2310.00535).

One function per study of `joma.studies`, named after it. They take the study's
summary, fresh or read back from summary.json, return a figure and write
nothing; `CAPTIONS` says what each shows.

Letters: R runs, S times, M tokens, K hidden nodes, J components.
"""

from collections.abc import Mapping, Sequence
import types
from typing import Any

from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import lines as mpl_lines
import numpy as np

from scansnap_jax.experiment import figures

Summary = Mapping[str, Any]

CAPTIONS = types.MappingProxyType({
    "figure2": (
        "Theorem 1 under softmax attention. Top: normalized correlation of z"
        " with what the theorem makes of the MLP's lower layer, and with either"
        " of its terms alone. Bottom: what correlation does not see, slope and"
        " relative error of the printed law, and the relative error of the"
        " exact one. Lines: mean over seeds; bands: smallest to largest."
    ),
    "figure3": (
        "Lower layer V = U_Cᵀ W of the first run, |v_lk| at the start and the"
        " end; the first four components of node v_0; and on how many tokens a"
        " node is, (Σ_l v_l²)² / Σ_l v_l⁴, mean over nodes and seeds."
    ),
    "figure4": (
        "Reduced dynamics with attention. Left: components on their way to μ_j"
        " (ticks on the right); right: entropy of attention, and its minimum."
    ),
    "invariants": (
        "Relative error of Theorem 1's laws after a fixed time against the step"
        " size, one line per activation; filled: the smallest, open: the"
        " largest number of queries, in the sum over queries. Softmax: the"
        " exact law; crosses: the printed one, whose error stays. Dotted:"
        " proportion."
    ),
    "erf": (
        "Theorem 2. Left: components until shortly before the blow-up of the"
        " winner; dotted: where the others freeze. Middle and right: erf / Δ_l"
        " of every token, with v/√2, where all fall on √(2/π) t (black), and"
        " with v/2."
    ),
    "convergence": (
        "Theorem 4. Left: gaps δ_j = 1 − v_j / μ_j, as ln(1/δ_j), with (lines)"
        " and without attention (dashed). Middle: ratios of neighbours and"
        " their limits (dashed). Right: λ and its limits (dashed)."
    ),
    "entropy_bounce": (
        "Components v_j / μ_j and the entropy of softmax(v²), with attention"
        " that follows the MLP and with frozen attention."
    ),
    "hblt": (
        "Probability that a token occurs if another one does, against the depth"
        " H of their lowest common ancestor. Lines: Theorem 5 (at the root,"
        " where it does not apply, the exact value); crosses: enumeration; open"
        " circles: samples, with four standard errors."
    ),
    "stable_rank": (
        "Stable rank of the lower layer (mean and sample standard deviation"
        " over draws of its targets) and entropy of attention, with attention"
        " that follows the MLP and with frozen attention."
    ),
})

_MODE_TITLES = {"gaussian": "moving bump", "random": "random contexts"}
# Known twice, by colour and by line.
_WITH, _WITHOUT = (
    figures.CurveStyle("#0072B2", "o", "-"),
    figures.CurveStyle("#D55E00", "s", (0, (5, 1.2))),
)


def figure2(summary: Summary) -> mpl_figure.Figure:
  """Draws correlation above, slope and relative errors below, by mode."""
  looks = _looks(3)
  rows = (
      (
          ("correlation", "both terms"),
          ("first_term", "first term alone"),
          ("second_term", "second term alone"),
      ),
      (
          ("slope", "slope, printed law"),
          ("relative_error", "relative error, printed law"),
          ("exact_relative_error", "relative error, exact law"),
      ),
  )
  steps = np.asarray(summary["steps"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 4.7)
    parts = figure.subfigures(2, 1, squeeze=False)[:, 0]
    for part, curves in zip(parts, rows, strict=True):
      panels = part.subplots(1, 2, sharey=True)
      for axes, (mode, title) in zip(panels, _MODE_TITLES.items(), strict=True):
        for (name, label), look in zip(curves, looks, strict=True):
          # In the lower row nothing has changed yet at the first step.
          skip = 0 if curves is rows[0] else 1
          band = {n: c[skip:] for n, c in summary[mode][name].items()}
          _draw_range(axes, steps[skip:], band, look, label)
        axes.set(xlabel="step", xlim=(0, steps[-1]), title=title)
      figures.put_legend_above(part, figures.legend_entries(*panels))
      if curves is rows[0]:
        panels[0].set(ylabel="normalized correlation", ylim=(-0.6, 1.05))
      else:
        panels[0].set(ylabel="slope, relative error", yscale="log")
  return figure


def figure3(summary: Summary) -> mpl_figure.Figure:
  """Draws V at start and end, components of v_0 and effective numbers."""
  steps = np.asarray(summary["steps"])
  looks = _looks(4)
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 4.4)
    parts = figure.subfigures(2, 1, squeeze=False)[:, 0]
    for part, (mode, title) in zip(parts, _MODE_TITLES.items(), strict=True):
      part.suptitle(title)
      first, last, components, effective = part.subplots(
          1, 4, width_ratios=(1, 1, 1.35, 1.35)
      )
      for axes, name, when in (
          (first, "first", "start"),
          (last, "last", f"step {steps[-1]}"),
      ):
        matrix = np.abs(summary[mode][name])
        image = figures.draw_heat_map(axes, matrix, float(matrix.max()))
        axes.set(title=f"$|v_{{lk}}|$, {when}", xlabel="node $k$")
        part.colorbar(image, ax=axes, location="bottom", aspect=12, pad=0.02)
      first.set_ylabel("token $l$")
      shown = np.asarray(summary[mode]["components"])
      for c, look in enumerate(looks[: shown.shape[1]]):
        _draw_curve(components, steps, shown[:, c], look, f"$l={c}$")
      components.set(title="$v_{l0}$", xlabel="step", xlim=(0, steps[-1]))
      legend = components.legend(
          loc="upper center",
          bbox_to_anchor=(0.5, -0.38),
          ncols=4,
          columnspacing=0.6,
          handlelength=1.4,
          handletextpad=0.3,
      )
      legend.set_in_layout(False)
      effective.plot(steps, summary[mode]["effective"], color="black")
      effective.set(
          title="tokens per node",
          xlabel="step",
          xlim=(0, steps[-1]),
          ylim=(0, None),
      )
  return figure


def figure4(summary: Summary) -> mpl_figure.Figure:
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


def invariants(summary: Summary) -> mpl_figure.Figure:
  """Draws relative error against step size, one panel a kind of attention."""
  queries = sorted({row["num_queries"] for row in summary["laws"]})
  activations = [*dict.fromkeys(row["activation"] for row in summary["laws"])]
  looks = dict(zip(activations, _looks(len(activations)), strict=True))
  step_sizes = np.asarray(summary["step_sizes"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.9)
    panels = figure.subplots(1, 3, sharey=True)
    kinds = ("linear", "exp", "softmax")
    for axes, kind in zip(panels, kinds, strict=True):
      rows = [row for row in summary["laws"] if row["attention"] == kind]
      for row in rows:
        if row["num_queries"] in (queries[0], queries[-1]):
          is_first = row["num_queries"] == queries[0]
          look = looks[row["activation"]]
          _draw_law(axes, step_sizes, row, look, is_first)
      highest = max(row["relative_error"][-1] for row in rows)
      guide = 3 * highest * step_sizes / step_sizes[-1]
      axes.plot(step_sizes, guide, "k:", linewidth=0.8, label=r"$\propto\eta$")
      axes.set(title=f"{kind} attention", xlabel=r"step size $\eta$")
      axes.set(xscale="log", yscale="log")
    for row in summary["printed"]:
      if row["num_queries"] == queries[0]:
        error, look = row["printed_relative_error"], looks[row["activation"]]
        panels[2].plot(step_sizes[-1:], [error], "x", c=look.color)
    panels[0].set_ylabel("relative error")
    entries = figures.legend_entries(*panels)
    if queries[-1] > queries[0]:
      entries[f"{queries[-1]} queries"] = mpl_lines.Line2D(
          [], [], color="black", linestyle=(0, (3, 2)), marker="o", mfc="white"
      )
    entries["printed law"] = mpl_lines.Line2D(
        [], [], color="black", linestyle="", marker="x"
    )
    figures.put_legend_above(figure, entries)
  return figure


def _draw_law(
    axes: mpl_axes.Axes,
    step_sizes: np.ndarray,
    row: Mapping[str, Any],
    look: figures.CurveStyle,
    is_first: bool,
) -> None:
  """Draws the error of a law: filled for the first number of queries."""
  axes.plot(
      step_sizes,
      row["relative_error"],
      color=look.color,
      marker=look.marker,
      linestyle="-" if is_first else (0, (3, 2)),
      markerfacecolor=look.color if is_first else "white",
      linewidth=0.8,
      label=row["activation"] if is_first else None,
  )


def erf(summary: Summary) -> mpl_figure.Figure:
  """Draws components, and both forms of the erf relation."""
  times, v = np.asarray(summary["times"]), np.asarray(summary["v"])
  delta = summary["delta"]
  looks = _looks(len(delta))
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
        _draw_curve(axes, times, values[:, j], look, label)
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


def convergence(summary: Summary) -> mpl_figure.Figure:
  """Draws gaps in logarithms, their ratios and lambda."""
  times, mu = np.asarray(summary["times"]), summary["mu"]
  gaps = {n: np.asarray(x) for n, x in summary["log_inverse_gap"].items()}
  looks = _looks(len(mu))
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.7)
    left, middle, right = figure.subplots(1, 3)
    for j, look in enumerate(looks):
      solid = look._replace(linestyle="-")
      label = rf"$\mu_j={mu[j]:g}$"
      _draw_curve(left, times, gaps["with"][:, j], solid, label)
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
        _draw_curve(axes, times, values[:, j], solid, label)
      axes.set(title=title)
    for axes in (left, middle, right):
      axes.set(xlabel="time $t$", xscale="log", xlim=(times[0], times[-1]))
      axes.legend()
  return figure


def entropy_bounce(summary: Summary) -> mpl_figure.Figure:
  """Draws components with and without attention, and both entropies."""
  times, mu = np.asarray(summary["times"]), np.asarray(summary["mu"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.7)
    *courses, entropies = figure.subplots(1, 3)
    looks = _looks(len(mu))
    for axes, name in zip(courses, ("with", "without"), strict=True):
      v = np.asarray(summary[name]["v"])
      for j, look in enumerate(looks):
        solid = look._replace(linestyle="-")
        label = rf"$\mu_j={mu[j]:g}$"
        _draw_curve(axes, times, v[:, j] / mu[j], solid, label)
      axes.set(title=f"{name} attention", ylabel=r"$v_j/\mu_j$", ylim=(0, 1.05))
      axes.legend(loc="lower right")
    for name, look in (("with", _WITH), ("without", _WITHOUT)):
      entropy = summary[name]["entropy"]
      _draw_curve(entropies, times, entropy, look, f"{name} attention")
    entropies.set(
        title="attention entropy", ylabel="nats", yscale="log", ylim=(2e-3, 2)
    )
    entropies.legend(loc="lower right")
    for axes in (*courses, entropies):
      axes.set(xlabel="time $t$", xlim=(0, times[-1]))
  return figure


def hblt(summary: Summary) -> mpl_figure.Figure:
  """Draws co-occurrence against the depth of the common ancestor."""
  rows = summary["rows"]
  looks = _looks(len(rows))
  with figures.style():
    figure = figures.make_figure(figures.COLUMN_WIDTH, 3.0)
    axes = figure.subplots()
    for row, look in zip(rows, looks, strict=True):
      law = [
          exact if theorem is None else theorem
          for theorem, exact in zip(row["theorem"], row["exact"], strict=True)
      ]
      axes.plot(
          row["depths"],
          law,
          color=look.color,
          linestyle=look.linestyle,
          label=rf"$\rho={row['polarity']:g}$",
      )
      axes.plot(row["depths"], row["enumerated"], "x", color=look.color)
      axes.errorbar(
          row["depths"],
          row["sampled"],
          4 * np.asarray(row["sampled_error"]),
          color=look.color,
          marker="o",
          linestyle="",
          markersize=6,
          markerfacecolor="none",
          elinewidth=0.7,
      )
    depths = rows[0]["depths"]
    labels = ["root" if h < 0 else str(h) for h in depths]
    axes.set_xticks(depths, labels)
    axes.set(
        xlabel="depth $H$ of the common ancestor",
        ylabel="$P(y_l=1\\,|\\,y_m=1)$",
        ylim=(None, 1.03),
    )
    entries = figures.legend_entries(axes)
    figures.put_legend_above(figure, entries)
  return figure


def stable_rank(summary: Summary) -> mpl_figure.Figure:
  """Draws stable rank and attention entropy against time."""
  times = np.asarray(summary["times"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.6)
    left, right = figure.subplots(1, 2)
    for name, look in (("with", _WITH), ("without", _WITHOUT)):
      label = f"{name} attention"
      ranks = np.asarray(summary[name]["stable_rank"])
      figures.draw_band(left, times, ranks, look, label)
      _draw_curve(right, times, summary[name]["entropy"], look, label)
    left.set(ylabel=r"stable rank $\|V\|_F^2/\|V\|_2^2$", ylim=(1, None))
    right.set(ylabel="attention entropy (nats)", ylim=(0, None))
    for axes in (left, right):
      axes.set(xlabel="time $t$", xscale="log", xlim=(times[0], times[-1]))
    figures.put_legend_above(figure, figures.legend_entries(left))
  return figure


def _looks(count: int) -> list[figures.CurveStyle]:
  """Chooses looks of which the first differ most, also in grey."""
  others = map(float, range(100, 100 + count))
  values = (0.5, 1.0, 2.0, 0.2, 4.0, 0.1, 8.0, *others)
  return [*figures.curve_styles(values).values()][:count]


def _draw_curve(
    axes: mpl_axes.Axes,
    x: np.ndarray,
    y: np.ndarray | Sequence[float],
    look: figures.CurveStyle,
    label: str,
) -> None:
  """Draws a line with a few markers."""
  every = figures.sparsely(len(x), look)
  axes.plot(x, y, **look._asdict(), markevery=every, label=label)


def _draw_range(
    axes: mpl_axes.Axes,
    x: np.ndarray,
    band: Mapping[str, Sequence[float]],
    look: figures.CurveStyle,
    label: str,
) -> None:
  """Draws a mean, and the range from the smallest to the largest run."""
  _draw_curve(axes, x, band["mean"], look, label)
  low, high = np.asarray(band["min"]), np.asarray(band["max"])
  figures.shade(axes, x, low, high, look)
