"""The figures of the studies of JoMA's open questions.

One function per study (https://arxiv.org/abs/2310.00535; `joma.studies`), named
after it. They take its summary, fresh or read back from summary.json, return a
figure and write nothing; `CAPTIONS` says what each shows.

Letters: S records.
"""

from collections.abc import Mapping, Sequence
import types
from typing import Any

from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
import numpy as np

from scansnap_jax.experiment import figures

Summary = Mapping[str, Any]

_BANDS = "Lines and bands: mean over seeds and its 95 % interval (Student's t)."

CAPTIONS = types.MappingProxyType({
    "bounce": (
        "Entropy of attention along training, below a nonlinear MLP and a"
        " frozen read-out; with frozen attention, the entropy that attention"
        " would have by Theorem 1. Last panel: largest rise of each run after"
        f" a fall; dotted: what counts as a bounce. {_BANDS}"
    ),
    "linear_control": (
        "Entropy of attention below a linear MLP along training, under a"
        " stationary gradient (Theorem 2) and under the cross-entropy, for"
        " isotropic mixtures of several noises; and the largest rise after a"
        f" fall against noise. Dotted: what counts as a bounce. {_BANDS}"
    ),
    "joint_invariant": (
        "Theorem 1 as printed for softmax attention, under ReLU, with the"
        " read-out frozen, trained, and trained with the embeddings: normalized"
        " correlation, slope and relative error; and the relative error of the"
        " exact law of v, with trained embeddings of the law of their norms."
        f" Solid: random contexts; dashed: gaussian ones. {_BANDS}"
    ),
    "drift": (
        "Drift of b̄ and relative errors of the softmax invariant: as printed,"
        " with b̄ moving, and with the exact second term. Last panel: error as"
        f" printed against drift, one line a run. {_BANDS}"
    ),
    "residual": (
        "Three queries or more with one MLP, with the query's residual (solid)"
        " and without (dashed), on labels that depend on the query (speaking)"
        " and that do not (silent). Distance: mean total variation between the"
        " attention of two queries. Last panel: relative error of Theorem 1"
        f" at the end, summed over queries and for single ones. {_BANDS}"
    ),
    "two_layer_hblt": (
        "Correlation of the best hidden node with the latents of a tree, mean"
        " over the latents of a depth (0: right under the root), on held-out"
        " samples: at the end, with floors, and along training. Bottom: share"
        " of the first layer's attention on leaves with a strong edge."
        f" {_BANDS}"
    ),
    "noisy_hblt": (
        "Correlation of the best hidden node with the latents of a tree against"
        " the polarity ρ of its edges, for trained and untrained nodes and for"
        " nodes trained on shuffled labels, on held-out samples; and held-out"
        f" accuracy. {_BANDS}"
    ),
})

_STYLES = ("-", (0, (5, 1.2)))


def bounce(summary: Summary) -> mpl_figure.Figure:
  """Draws `joma.studies.bounce`."""
  panels, steps = summary["panels"], np.asarray(summary["steps"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 4.4)
    *axes_of, last = figure.subplots(2, 3).ravel().tolist()
    names = [*next(iter(panels.values()))]
    looks = _looks(names)
    for axes, (panel, rows) in zip(axes_of, panels.items(), strict=True):
      for name in names:
        _draw_interval(axes, steps, rows[name]["entropy"], looks[name], name)
      axes.set(title=panel, xlabel="step", ylabel="entropy (nats)")
    for place, rows in enumerate(panels.values()):
      for shift, name in zip(_shifts(len(names)), names, strict=True):
        rises = np.maximum(rows[name]["rises"], 1e-4)
        x = np.full(len(rises), place + shift)
        look = looks[name]
        last.plot(x, rises, look.marker, color=look.color, alpha=0.8)
    last.axhline(summary["min_rise"], color="black", linestyle=":")
    last.set(
        title="rise after a fall, each run",
        ylabel="nats, at least 1e-4",
        yscale="log",
        xticks=range(len(panels)),
    )
    labels = [name.replace(", ", ",\n") for name in panels]
    last.set_xticklabels(labels, rotation=60, ha="right", fontsize=6)
    figures.put_legend_above(figure, figures.legend_entries(axes_of[0]))
  return figure


def linear_control(summary: Summary) -> mpl_figure.Figure:
  """Draws `joma.studies.linear_control`."""
  rows, steps = summary["rows"], np.asarray(summary["steps"])
  noises = [f"{noise:g}" for noise in summary["noises"]]
  looks = _looks(noises)
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.7)
    *curves, last = figure.subplots(1, 3)
    for axes, loss in zip(curves, ("stationary", "cross-entropy"), strict=True):
      for noise in noises:
        entropy = rows[loss]["identity"][noise]["entropy"]
        label = f"noise {noise}"
        _draw_interval(axes, steps, entropy, looks[noise], label)
      axes.set(title=f"linear, {loss}", xlabel="step", ylabel="entropy (nats)")
    lines = [
        (f"{name}, {loss}", rows[loss][activation])
        for loss, activation, name in (
            ("cross-entropy", "identity", "linear"),
            ("cross-entropy", "relu", "ReLU"),
            ("stationary", "identity", "linear"),
        )
    ]
    shapes = _looks([label for label, _ in lines])
    for label, row in lines:
      values = _points([row[noise]["rise"] for noise in noises])
      _draw_points(last, summary["noises"], values, shapes[label], label)
    last.axhline(summary["min_rise"], color="black", linestyle=":")
    last.set(
        title="rise after a fall",
        xlabel="noise (standard deviation)",
        ylabel="nats",
        ylim=(0, None),
    )
    last.legend(fontsize=6)
    figures.put_legend_above(figure, figures.legend_entries(curves[0]))
  return figure


def joint_invariant(summary: Summary) -> mpl_figure.Figure:
  """Draws `joma.studies.joint_invariant`."""
  steps, rows = np.asarray(summary["steps"]), summary["rows"]
  uppers = list(dict.fromkeys(name.split("/")[0] for name in rows))
  looks = _looks(uppers)
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 4.4)
    panels = figure.subplots(2, 2).ravel().tolist()
    titles = (
        ("correlation", "printed law, correlation"),
        ("slope", "printed law, slope"),
        ("relative_error", "printed law, relative error"),
        ("exact", "exact laws, relative error"),
    )
    for axes, (curve, title) in zip(panels, titles, strict=True):
      for name, row in rows.items():
        upper, mode = name.split("/")
        look = looks[upper]._replace(linestyle=_STYLES[mode == "gaussian"])
        label = upper if mode == "random" else ""
        _draw_interval(axes, steps[1:], _tail(row[curve]), look, label)
        if curve == "exact" and "embedding" in row:
          norms = look._replace(color="black")
          label = "embeddings, law of their norms" if mode == "random" else ""
          _draw_interval(axes, steps[1:], _tail(row["embedding"]), norms, label)
      scale = "linear" if curve in ("correlation", "slope") else "log"
      axes.set(title=title, xlabel="step", yscale=scale)
    for mode, linestyle in zip(("random", "gaussian"), _STYLES, strict=True):
      line = dict(color="black", linewidth=0.8, linestyle=linestyle)
      panels[-1].plot([], [], label=f"{mode} contexts", **line)
    figures.put_legend_above(figure, figures.legend_entries(panels[-1]))
  return figure


def drift(summary: Summary) -> mpl_figure.Figure:
  """Draws `joma.studies.drift`."""
  steps, rows = np.asarray(summary["steps"])[1:], summary["rows"]
  curves = ("drift", "fixed", "moving", "exact")
  labels = ("drift of b̄", "error as printed", "b̄ moving", "exact second term")
  looks = _looks(curves)
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 4.4)
    panels = figure.subplots(2, 3).ravel().tolist()
    for axes, (name, row) in zip(panels, rows.items(), strict=False):
      for curve, label in zip(curves, labels, strict=True):
        _draw_interval(axes, steps, _tail(row[curve]), looks[curve], label)
      axes.set(title=name.replace("/", ", "), xlabel="step", yscale="log")
      axes.set_ylim(1e-3, None)
    share, against = panels[len(rows)], panels[len(rows) + 1]
    values = _points([row["share_mended"] for row in rows.values()])
    share.errorbar(*_as_errors(range(len(rows)), values), fmt="ko", capsize=2)
    share.set(title="share mended by a moving b̄", ylim=(0, 1.05))
    share.set_xticks(range(len(rows)))
    share.set_xticklabels([*rows], rotation=30, ha="right", fontsize=6)
    for (name, row), look in zip(
        rows.items(), _looks([*rows]).values(), strict=True
    ):
      for i, (x, y) in enumerate(
          zip(row["drifts"], row["errors"], strict=True)
      ):
        label = name.replace("/", ", ") if i == 0 else ""
        x, y = np.asarray(x)[1:], np.asarray(y)[1:]
        style = dict(color=look.color, linestyle=look.linestyle)
        against.plot(x, y, **style, linewidth=0.6, label=label)
    against.set(
        title="every run",
        xlabel="drift of b̄",
        ylabel="error as printed",
        xscale="log",
        yscale="log",
    )
    against.legend(fontsize=6)
    figures.put_legend_above(figure, figures.legend_entries(panels[0]))
  return figure


def residual(summary: Summary) -> mpl_figure.Figure:
  """Draws `joma.studies.residual`."""
  steps, rows = np.asarray(summary["steps"]), summary["rows"]
  attentions = list(dict.fromkeys(name.split("/")[0] for name in rows))
  looks = _looks(["silent", "speaking"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 4.6)
    grid = figure.subplots(2, 4)
    for line, attention in zip(grid, attentions, strict=True):
      of_kind = {n: r for n, r in rows.items() if n.startswith(attention)}
      curves = ("loss", "entropy", "distance")
      for axes, curve in zip(line[:3], curves, strict=True):
        for name, row in of_kind.items():
          _, task, is_on = name.split("/")
          look = looks[task]._replace(linestyle=_STYLES[is_on == "off"])
          label = f"{task}, residual {is_on}"
          _draw_interval(axes, steps, row[curve], look, label)
        title = {"distance": "distance of queries"}.get(curve, curve)
        axes.set(title=f"{attention}, {title}", xlabel="step")
      _draw_laws(line[-1], of_kind)
      line[-1].set(title=f"{attention}, errors", yscale="log")
    figures.put_legend_above(figure, figures.legend_entries(grid[0, 0]))
  return figure


def _draw_laws(axes: mpl_axes.Axes, rows: Mapping[str, Any]) -> None:
  for curve, look, label in (
      ("summed_law", "ko", "summed"),
      ("single_law", "ws", "single"),
  ):
    values = _points([row[curve] for row in rows.values()])
    axes.errorbar(
        *_as_errors(range(len(rows)), values),
        fmt=look,
        markeredgecolor="black",
        ecolor="black",
        elinewidth=0.7,
        label=label,
    )
  axes.set_xticks(range(len(rows)))
  labels = [" ".join(name.split("/")[1:]) for name in rows]
  axes.set_xticklabels(labels, rotation=60, ha="right", fontsize=6)
  axes.legend(fontsize=6)


def two_layer_hblt(summary: Summary) -> mpl_figure.Figure:
  """Draws `joma.studies.two_layer_hblt`."""
  cases = summary["cases"]
  times = np.asarray(summary["score_steps"])
  steps = np.asarray(summary["steps"])
  scores = np.asarray(cases["learned"]["scores"]["mean"])
  places = [
      (layer, depth)
      for depth in reversed(range(scores.shape[2]))
      for layer in range(scores.shape[1])
  ]
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.9)
    bars, course, share = figure.subplots(1, 3)
    floors = {
        "learned": cases["learned"]["scores"],
        "frozen": cases["frozen"]["scores"],
        "untrained": cases["learned"]["scores"],
        "shuffled labels": cases["shuffled"]["scores"],
        "other samples": cases["learned"]["chance"],
    }
    looks = _looks([*floors])
    shifts = _shifts(len(floors))
    for shift, (name, parts) in zip(shifts, floors.items(), strict=True):
      time = 0 if name == "untrained" else -1
      values = _at(parts, time, places)
      x = np.arange(len(places)) + shift
      look = looks[name]._replace(linestyle="")
      _draw_points(bars, x, values, look, name)
    bars.set(title="end of training", ylabel="correlation", ylim=(0, 1))
    bars.set_xticks(range(len(places)))
    bars.set_xticklabels(
        [f"layer {layer + 1}\ndepth {depth}" for layer, depth in places],
        fontsize=6,
    )
    curves = _looks([str(place) for place in places])
    for layer, depth in places:
      parts = {
          key: np.asarray(value)[:, layer, depth]
          for key, value in cases["learned"]["scores"].items()
      }
      label = f"layer {layer + 1}, depth {depth}"
      look = curves[str((layer, depth))]
      _draw_interval(course, times, parts, look, label)
    course.set(title="learned attention", xlabel="step", ylim=(0, 1))
    course.legend(fontsize=6, loc="lower right")
    for case in ("learned", "frozen"):
      strong = cases[case]["strong_share"]
      _draw_interval(share, steps, strong, looks[case], case)
    share.set(title="attention on strong leaves", xlabel="step", ylim=(0, 1))
    figures.put_legend_above(figure, figures.legend_entries(bars))
  return figure


def noisy_hblt(summary: Summary) -> mpl_figure.Figure:
  """Draws `joma.studies.noisy_hblt`."""
  rows, polarities = summary["rows"], np.asarray(summary["polarities"])
  order = [f"{polarity:g}" for polarity in polarities]
  shape = np.shape(rows[order[0]]["trained"]["mean"])
  places = [
      (layer, depth) for layer in range(shape[0]) for depth in range(shape[1])
  ]
  looks = _looks(["trained", "untrained", "shuffled"])
  with figures.style():
    figure, panels = figures.make_panels(len(places) + 1, "correlation")
    for axes, (layer, depth) in zip(panels, places, strict=False):
      for name, look in looks.items():
        values = np.array([
            [np.asarray(rows[key][name][part])[layer, depth] for key in order]
            for part in ("mean", "low", "high")
        ])
        label = "shuffled labels" if name == "shuffled" else name
        _draw_points(axes, polarities, values, look, label)
      axes.set(
          title=f"layer {layer + 1}, depth {depth}",
          xlabel="polarity ρ",
          ylim=(0, 1.02),
      )
    accuracy = _points([rows[key]["accuracy"] for key in order])
    look = _looks(["trained"])["trained"]
    _draw_points(panels[-1], polarities, accuracy, look, "")
    chance = 1 / summary["num_classes"]
    panels[-1].axhline(chance, color="black", linestyle=":")
    panels[-1].set(title="held-out accuracy", xlabel="polarity ρ")
    figures.put_legend_above(figure, figures.legend_entries(panels[0]))
  return figure


def _looks(names: Sequence[str]) -> dict[str, figures.CurveStyle]:
  """Gives each name its look; grey and pink come after the darker colours."""
  # No rates of the paper, so that they take the palette in order.
  numbers = [1000.0 + i for i in range(max(7, len(names)))]
  looks = [*figures.curve_styles(numbers).values()]
  order = (*looks[2:7], *looks[:2], *looks[7:])
  return dict(zip(names, order, strict=False))


def _shifts(count: int) -> np.ndarray:
  return 0.15 * (np.arange(count) - (count - 1) / 2)


def _tail(parts: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Leaves the start away, where nothing has changed yet."""
  return {key: np.asarray(value)[1:] for key, value in parts.items()}


def _points(rows: Sequence[Mapping[str, float]]) -> np.ndarray:
  """Mean, low and high as rows."""
  return np.array([[row[k] for row in rows] for k in ("mean", "low", "high")])


def _at(parts: Mapping[str, Any], time: int, places: Any) -> np.ndarray:
  return np.array([
      [np.asarray(parts[key])[time, layer, depth] for layer, depth in places]
      for key in ("mean", "low", "high")
  ])


def _as_errors(x: Any, values: np.ndarray) -> tuple[Any, ...]:
  mean, low, high = values
  return np.asarray(x), mean, np.stack([mean - low, high - mean])


def _draw_points(
    axes: mpl_axes.Axes,
    x: Any,
    values: np.ndarray,
    look: figures.CurveStyle,
    label: str,
) -> None:
  x, mean, errors = _as_errors(x, values)
  axes.errorbar(
      x, mean, errors, **look._asdict(), label=label or None, elinewidth=0.7
  )


def _draw_interval(
    axes: mpl_axes.Axes,
    x: np.ndarray,
    parts: Mapping[str, Any],
    look: figures.CurveStyle,
    label: str,
) -> None:
  mean, low, high = (np.asarray(parts[k]) for k in ("mean", "low", "high"))
  every = figures.sparsely(len(x), look)
  axes.plot(x, mean, **look._asdict(), markevery=every, label=label or None)
  figures.shade(axes, x, low, high, look)
