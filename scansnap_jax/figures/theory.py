"""Figures 3, 8 and 9 of Scan & Snap (https://arxiv.org/abs/2305.16380).

They draw theory alone. Each function returns a figure and writes nothing;
`CAPTIONS` says what each shows.
"""

import types

import jax
import jax.numpy as jnp
from matplotlib import figure as mpl_figure
import numpy as np

from scansnap_jax import gains
from scansnap_jax import growth
from scansnap_jax.experiment import figures

# One compilation serves all rates of a panel.
_gain_exponent = jax.jit(gains.gain_exponent)
_h_continuous = jax.jit(growth.h_continuous, static_argnames="num_tokens")
_h_discrete = jax.jit(
    growth.h_discrete, static_argnames=("num_steps", "num_tokens")
)

CAPTIONS = types.MappingProxyType({
    "figure3": (
        "Growth of the relative gain of a class's leading distinct token, χ ="
        " exp(2 B_n(t)) with B_n as Theorem 4 derives it: nearly linear while"
        " attention scans, logarithmic after it snaps at t_0 (dashed). K = 10,"
        " M = 1000, η_Z = 0.5, C_0 = 1. The paper does not give its C_0, so its"
        " vertical axis (up to 600) cannot be pinned down."
    ),
    "figure8": (
        "How far the logits of a class have grown when it was seen so often:"
        " the steps h*(s) of gradient descent (Lemma 5) and, in black, h(t) in"
        " continuous time (Lemma 6), for several η_Y."
    ),
    "figure9": (
        "Exponent B_n(t) of the relative gain (Theorem 4), K = 1, C_0 = 1, for"
        " several η_Z. Markers: t_0, where attention snaps; B_n(t_0) depends on"
        " η_Y/η_Z alone."
    ),
})


def figure3() -> mpl_figure.Figure:
  """Draws e^{2 B_n(t)}, which bounds the growth chi of the gain (Theorem 3)."""
  times = jnp.linspace(0.0, 700.0, 701)
  with figures.style():
    figure = figures.make_figure(figures.COLUMN_WIDTH, 2.6)
    axes = figure.subplots()
    for eta_y, look in figures.curve_styles((0.5, 1.0, 2.0, 5.0)).items():
      run = growth.TheoryRun(
          num_tokens=1000, num_classes=10, eta_y=eta_y, eta_z=0.5
      )
      exponent = _gain_exponent(times, run)
      axes.plot(
          times,
          gains.gain_growth_bounds(1.0, exponent)[1],
          **look._asdict(),
          markevery=figures.sparsely(len(times), look),
          label=rf"$\eta_Y={eta_y:g}$",
      )
      start = float(growth.snapping_start(run))
      axes.axvline(start, color=look.color, linewidth=0.8, linestyle="--")
    axes.plot([], [], "k--", linewidth=0.8, label="$t_0$")
    axes.set(
        xlabel="samples seen, $t$",
        ylabel=r"gain growth $\chi_{l_0}(t) = e^{2B_n(t)}$",
        xlim=(0, 700),
        ylim=(0, None),
    )
    entries = figures.legend_entries(axes)
    figures.put_legend_above(figure, entries)
  return figure


def figure8() -> mpl_figure.Figure:
  """Draws h*(s) of gradient descent (Lemma 5) and h(t) of Lemma 6."""
  settings = (
      (50, (0.1, 0.2, 0.5, 1.0, 2.0), 80),
      (1000, (0.2, 0.5, 1.0, 2.0, 4.0), 70),
  )
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.9)
    panels = figure.subplots(1, 2)
    for axes, (num_tokens, rates, end) in zip(panels, settings, strict=True):
      times = jnp.linspace(0.0, end, 10 * end + 1)
      for eta_y, look in figures.curve_styles(rates).items():
        rule = dict(num_tokens=num_tokens, eta_y=eta_y)
        axes.step(
            np.arange(end + 1),
            _h_discrete(end, **rule),
            where="post",
            markevery=figures.sparsely(end, look),
            label=rf"$\eta_Y={eta_y:g}$",
            **look._replace(linestyle="-")._asdict(),
        )
        smooth = _h_continuous(times, **rule)
        axes.plot(times, smooth, color="black", linewidth=0.6)
      axes.plot([], [], color="black", linewidth=0.6, label="$h(s)$")
      axes.set(
          title=f"$M={num_tokens}$",
          xlabel="times the class was seen, $s$",
          ylabel="$h^*(s)$ and $h(s)$",
          xlim=(0, end),
          ylim=(0, None),
      )
      axes.legend(loc="lower right", labelspacing=0.3)
  return figure


def figure9() -> mpl_figure.Figure:
  """Draws B_n(t) of Theorem 4 with a marker at t0."""
  settings = ((10.0, 100, 5.0), (1.0, 10_000, 50.0))
  looks = figures.curve_styles((0.5, 1.0, 2.0, 4.0, 8.0))
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.8)
    panels = figure.subplots(1, 2)
    for axes, (ratio, num_tokens, end) in zip(panels, settings, strict=True):
      times = np.linspace(0.0, end, 501)
      for eta_z, look in looks.items():
        run = growth.TheoryRun(
            num_tokens=num_tokens,
            num_classes=1,
            eta_y=ratio * eta_z,
            eta_z=eta_z,
        )
        start = float(growth.snapping_start(run))
        place = int(np.searchsorted(times, start))
        x = np.insert(times, place, start)
        axes.plot(
            x,
            _gain_exponent(jnp.asarray(x), run),
            **look._asdict(),
            markersize=5,
            markevery=[place],
            label=rf"$\eta_Z={eta_z:g}$",
        )
      axes.set(
          title=rf"$\eta_Y/\eta_Z={ratio:g},\ M={num_tokens}$",
          xlabel="samples seen, $t$",
          ylabel="$B_n(t)$",
          xlim=(0, end),
          ylim=(0, None),
      )
    entries = figures.legend_entries(*panels)
    figures.put_legend_above(figure, entries)
  return figure
