"""Figures of language-model runs: losses, attention by layer, attention maps.

They are those of Figures 7 and 10 of Scan & Snap
(https://arxiv.org/abs/2305.16380) and Figures 6 and 8 of JoMA
(https://arxiv.org/abs/2310.00535). They take summaries of groups of runs, as
`summary` makes them or as read back from JSON, and arrays of maps; they
return a figure and write nothing. `CAPTIONS` says what each shows.

Letters: M maps, L layers, N heads, T positions.
"""

from collections.abc import Callable, Mapping, Sequence
import types
from typing import Any

from jaxtyping import Float
import matplotlib
from matplotlib import axes as mpl_axes
from matplotlib import colors as mpl_colors
from matplotlib import figure as mpl_figure
from matplotlib import ticker as mpl_ticker
import numpy as np

from joma.transformer import probes as probes_lib
from scansnap_jax.experiment import figures

Group = Mapping[str, Any]

CAPTIONS = types.MappingProxyType({
    "losses": (
        "Cross-entropy per token against minibatches, and perplexity on the"
        " right: of the validation text (marked), and of the training text,"
        " mean over the minibatches of each row. Mean and sample standard"
        " deviation over seeds where there are several. Open markers: the"
        " authors' runs, where known. Of long runs the first losses lie above."
    ),
    "entropy": (
        "Entropy of attention on the validation text against minibatches, one"
        " curve a layer, mean over queries and heads; mean and sample standard"
        " deviation over seeds where there are several. Dashed: of the one"
        " sequence whose entropy the authors report, where it is measured. Open"
        " markers: the authors' runs, where known. Dotted: each query attends"
        " to all keys alike. Above: least validation loss, and where."
    ),
    "probes": (
        "On the validation text, one curve a layer: share of heads that have"
        f" more than {probes_lib.SINK_THRESHOLD:g} of their attention on the"
        " first key, mean over queries; number of keys that attention is"
        " spread over, the mean of exp(entropy); stable rank of the MLP's"
        " lower matrix, the square of the ratio of its Frobenius norm to its"
        " spectral norm."
    ),
    "final_entropy": (
        "Entropy of attention on the validation text after training, mean over"
        " layers, against the learning rate; mean and sample standard"
        " deviation over seeds where there are several. Open markers: the"
        " authors' runs, where known."
    ),
    "maps": (
        "Attention weights of one sequence of the training text along training:"
        " a row is a query, a column a key, both in the order of the text. The"
        " colour is that of the square root of the weight; white is out of"
        " sight. The last map is that of the trained model. Where there is room"
        " the tokens stand beside rows and columns, a space as \u2423 and a"
        " line's end as \u21b5."
    ),
})

_PROBES = {
    "sink_rate": ("sinks", "share of heads"),
    "effective_support": ("effective support", "keys"),
    "stable_rank": ("stable rank of the lower MLP", "rank"),
}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_MOST_MAP_ROWS = 4
# Of the authors' curves about so many points are shown.
_NUM_KNOWN = 12
# Of more groups the training losses would hide the rest.
_MOST_TRAINING_CURVES = 3
_SHORT_RUN = 20
# Points from one token to the next, and characters of a token, beside a map.
_TOKEN_PITCH, _TOKEN_LENGTH = 8, 8


def losses(groups: Sequence[Group]) -> mpl_figure.Figure:
  """Draws the validation loss of each group, and of few also the training's."""
  with figures.style():
    width = figures.COLUMN_WIDTH if len(groups) == 1 else figures.PAGE_WIDTH
    figure = figures.make_figure(width, 2.6)
    axes = figure.subplots()
    entries: dict[str, Any] = {}
    for i, group in enumerate(groups):
      look = _look_in_order(i, len(groups))
      steps, train = np.array(group["steps"]), _array(
          group["train_loss"]["mean"]
      )
      label = figures.as_is(describe(group, groups))
      label = "validation text" if len(groups) == 1 else label
      _draw_curve(axes, steps, group["valid_loss"], look, label)
      _draw_authors(axes, group, lambda authors: authors["valid_loss"], look)
      entries |= figures.legend_entries(axes)
      if len(groups) <= _MOST_TRAINING_CURVES and np.isfinite(train).any():
        thin = {"color": look.color, "alpha": 0.5, "linewidth": 0.7}
        known = np.isfinite(train)
        (entries["training text"],) = axes.plot(
            steps[known], train[known], **thin
        )
    axes.set(xlabel="minibatch", ylabel="nats per token")
    _cut_start(axes)
    _count_in_thousands(axes)
    _add_perplexities(axes)
    _put_legend(figure, entries, groups)
  return figure


def entropy(groups: Sequence[Group]) -> mpl_figure.Figure:
  """Draws attention entropy by layer, one panel a group."""
  with figures.style():
    figure, panels = figures.make_panels(
        len(groups), "attention entropy (nats)"
    )
    depth = max(group["num_layers"] for group in groups)
    for axes, group in zip(panels, groups, strict=True):
      _draw_layers(axes, group, "entropy", depth)
      uniform = group["uniform_entropy"]
      axes.axhline(uniform, color="black", linestyle=":", label="uniform")
      axes.set_title(figures.as_is(describe(group, groups)), pad=13)
      axes.text(
          0.5,
          1.03,
          _best(group),
          transform=axes.transAxes,
          fontsize=7,
          ha="center",
      )
      _start_at_zero(axes)
    entries = figures.legend_entries(*panels)
    entries["uniform"] = entries.pop("uniform")  # Comes last.
    _put_legend(figure, entries, groups)
  return figure


def _best(group: Group) -> str:
  """The least validation losses in words."""
  name = lambda best: f"{best['value']:.3f} @ {_short(best['step'])}"
  if group["best_valid_loss"] is None:
    return ""
  text = f"loss {name(group['best_valid_loss'])}"
  authors = group["authors"]
  if authors is not None and len(authors["steps"]) > 1:
    text += f" (authors {name(authors['best_valid_loss'])})"
  return text


def probes(group: Group) -> mpl_figure.Figure:
  """Draws the other probes of one group by layer, one panel each."""
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.4)
    panels = figure.subplots(1, len(_PROBES))
    for axes, (name, (title, unit)) in zip(
        panels, _PROBES.items(), strict=True
    ):
      _draw_layers(axes, group, name, group["num_layers"])
      axes.set(title=title, ylabel=unit)
      _start_at_zero(axes)
    panels[0].set_ylim(-0.04, 1.04)  # A share.
    figures.put_legend_above(figure, figures.legend_entries(*panels))
  return figure


def final_entropy(groups: Sequence[Group]) -> mpl_figure.Figure:
  """Draws the last attention entropy against the rate, a curve a depth."""
  with figures.style():
    figure = figures.make_figure(figures.COLUMN_WIDTH, 2.6)
    axes = figure.subplots()
    depths = sorted({group["num_layers"] for group in groups})
    for i, depth in enumerate(depths):
      look = _look_in_order(i, len(depths))
      points = final_entropies(groups, depth)
      columns = {name: _array([p[name] for p in points]) for name in points[0]}
      x, spread = columns["lr"], np.nan_to_num(columns["std"])
      figures.draw_points(
          axes, x, columns["mean"], spread, look, _layers(depth)
      )
      figures.draw_known_points(axes, x, columns["authors"], look=look)
    rates = [group["lr"] for group in groups]
    if min(rates) > 0 and max(rates) / min(rates) > 5:
      axes.set_xscale("log")
    axes.set(xlabel="learning rate", ylabel="attention entropy (nats)")
    _start_at_zero(axes)
    _put_legend(figure, figures.legend_entries(axes), groups)
  return figure


def final_entropies(
    groups: Sequence[Group], num_layers: int
) -> list[dict[str, Any]]:
  """The points of one curve of `final_entropy`, by rising rate."""
  found: list[dict[str, Any]] = []
  for group in groups:
    if group["num_layers"] == num_layers:
      authors = group["authors"]
      ends = authors and [layer["end"] for layer in authors["layers"]]
      found.append({
          "lr": group["lr"],
          **group["final_entropy"],
          "authors": float(np.mean(ends)) if ends else None,
      })
  return sorted(found, key=lambda point: point["lr"])


def maps(
    attn_maps: Float[np.ndarray, "M L N T T"],
    steps: Sequence[int],
    *,
    tokens: Sequence[str] | None = None,
) -> mpl_figure.Figure:
  """Draws attention maps: a column a step, a row a layer and head.

  Of more than four rows, four are drawn, spread over layers and heads.

  Args:
    attn_maps: Attention weights, rows of queries.
    steps: When each of the M was taken.
    tokens: Texts of the T tokens; they are written where there is room.
  """
  shown = shown_maps(*attn_maps.shape[1:3])
  with figures.style():
    width = min(figures.PAGE_WIDTH, 1.2 + 1.9 * len(steps))
    height = 0.5 + len(shown) * ((width - 1.2) / len(steps) + 0.1)
    figure = figures.make_figure(width, height)
    grid = figure.subplots(
        len(shown), len(steps), squeeze=False, sharex=True, sharey=True
    )
    image = None
    for row, (layer, head) in zip(grid, shown, strict=True):
      for axes, of_step in zip(row, attn_maps, strict=True):
        hidden = np.triu(np.ones(of_step.shape[-2:], bool), 1)
        weights = np.where(hidden, np.nan, of_step[layer, head])
        image = figures.draw_heat_map(axes, weights, 1.0)
        image.set_norm(mpl_colors.PowerNorm(0.5, 0, 1))
        axes.patch.set(hatch=None, facecolor="white")
        axes.set_aspect("equal")
        _write_tokens(axes, tokens, (width - 1.2) / len(steps))
      name = f"layer {layer}"
      name += f", head {head}" if attn_maps.shape[2] > 1 else ""
      row[0].set_ylabel(f"{name}\nquery" if len(shown) > 1 else "query")
    for axes, step in zip(grid[0], steps, strict=True):
      axes.set_title(f"minibatch {step:,}")
    for axes in grid[-1]:
      axes.set_xlabel("key")
    if image is not None:
      bar = figure.colorbar(image, ax=grid, fraction=0.02, aspect=30)
      bar.set_ticks(
          [0, 0.1, 0.25, 0.5, 1], labels=["0", ".1", ".25", ".5", "1"]
      )
      bar.set_label("attention weight (root scale)")
  return figure


def _write_tokens(
    axes: mpl_axes.Axes, tokens: Sequence[str] | None, inches: float
) -> None:
  """Writes tokens beside the rows and columns of a map, if they have room."""
  if tokens is None or len(tokens) * _TOKEN_PITCH > 72 * inches:
    return
  shown = [figures.as_is(_visible(token)) for token in tokens]
  axes.set_yticks(range(len(tokens)), shown, fontsize=7)
  axes.set_xticks(range(len(tokens)), shown, fontsize=7, rotation=90)
  for sides in (axes.xaxis, axes.yaxis):
    sides.set_tick_params(length=0)


def _visible(token: str) -> str:
  """A token with its blanks as signs, cut to what has room."""
  text = token.replace(" ", "\u2423").replace("\n", "\u21b5")
  text = "".join(c if c.isprintable() else "\ufffd" for c in text)
  return (
      text
      if len(text) <= _TOKEN_LENGTH
      else text[: _TOKEN_LENGTH - 1] + "\u2026"
  )


def shown_maps(num_layers: int, num_heads: int) -> list[tuple[int, int]]:
  """Layers and heads that `maps` draws."""
  pairs = [(i, n) for i in range(num_layers) for n in range(num_heads)]
  if len(pairs) > _MOST_MAP_ROWS:
    places = np.linspace(0, len(pairs) - 1, _MOST_MAP_ROWS).round().astype(int)
    pairs = [pairs[place] for place in places]
  return pairs


def describe(group: Group, groups: Sequence[Group]) -> str:
  """What tells a group from the others, layers first."""
  text = _layers(group["num_layers"])
  if len({other["lr"] for other in groups}) > 1 or len(groups) == 1:
    text += f", lr {_rate(group['lr'])}"
  for name in ("preset", "corpus", "optimizer"):
    if len({other[name] for other in groups}) > 1:
      text += f", {group[name]}"
  return text


def _rate(lr: float | int) -> str:
  """A learning rate: 5, 0.5, 1e-4."""
  if lr >= 0.01:
    return f"{lr:g}"
  mantissa, exponent = f"{lr:e}".split("e")
  return f"{float(mantissa):g}e{int(exponent)}"


def _layers(count: int) -> str:
  return f"{count} layer" + ("s" if count > 1 else "")


def _draw_layers(
    axes: mpl_axes.Axes, group: Group, name: str, depth: int
) -> None:
  """Draws a curve a layer, and the authors' where it is the entropy."""
  steps = np.array(group["steps"])
  for layer in range(group["num_layers"]):
    look = _look_in_order(layer, depth)
    curve = {kind: group[name][kind][layer] for kind in ("mean", "std")}
    _draw_curve(axes, steps, curve, look, f"layer {layer}")
    if name == "entropy":
      chunk = _array(group["chunk_entropy"]["mean"][layer])
      if np.isfinite(chunk).any():
        thin = look._replace(marker="", linestyle="--")
        axes.plot(steps, chunk, **thin._asdict(), label="one sequence")
      pick = lambda authors, layer=layer: {
          "mean": authors["entropy"]["mean"][layer]
      }
      _draw_authors(axes, group, pick, look)
  axes.set(xlabel="minibatch")
  _count_in_thousands(axes)


def _look_in_order(place: int, count: int) -> figures.CurveStyle:
  """From dark to light, for what has an order: layers, depths, rates."""
  share = 0.05 + 0.8 * place / max(1, count - 1)
  color = mpl_colors.to_hex(matplotlib.colormaps["viridis"](share))
  return figures.CurveStyle(color, _MARKERS[place % len(_MARKERS)], "-")


def _draw_curve(
    axes: mpl_axes.Axes,
    steps: np.ndarray,
    curve: Mapping[str, Any],
    look: figures.CurveStyle,
    label: str,
) -> None:
  """Draws a mean where it is known, and a band of one deviation."""
  mean, std = _array(curve["mean"]), _array(curve["std"])
  known = np.isfinite(mean)
  x, mean, std = steps[known], mean[known], std[known]
  every = figures.sparsely(len(x), look)
  axes.plot(x, mean, **look._asdict(), markevery=every, label=label)
  if np.isfinite(std).any():
    figures.shade(axes, x, mean - std, mean + std, look)


def _draw_authors(
    axes: mpl_axes.Axes,
    group: Group,
    pick: Callable[[Group], Mapping[str, Any]],
    look: figures.CurveStyle,
) -> None:
  """Draws the authors' points, thinned out, the least one among them."""
  if group["authors"] is None:
    return
  steps = np.array(group["authors"]["steps"])
  mean = _array(pick(group["authors"])["mean"])
  every = -(-len(steps) // _NUM_KNOWN)
  kept = np.union1d(np.arange(0, len(steps), every), np.argmin(mean))
  figures.draw_known_points(axes, steps[kept], mean[kept], look=look)


def _put_legend(
    figure: mpl_figure.Figure, entries: dict[str, Any], groups: Sequence[Group]
) -> None:
  if any(group["authors"] is not None for group in groups):
    entries["authors"] = figures.known_entry()
  figures.put_legend_above(figure, entries)


def _cut_start(axes: mpl_axes.Axes) -> None:
  """Ends a long run's axis of losses at what they are after 2 % of it."""
  curves = [np.array(line.get_xydata()) for line in axes.get_lines()]
  curves = [curve for curve in curves if len(curve) > _SHORT_RUN]
  if curves:
    last = max(curve[-1, 0] for curve in curves)
    late = np.concatenate([c[c[:, 0] >= last / 50, 1] for c in curves])
    margin = 0.05 * np.ptp(late)
    axes.set_ylim(late.min() - margin, late.max() + margin)


def _start_at_zero(axes: mpl_axes.Axes) -> None:
  axes.set_ylim(0, 1.04 * axes.get_ylim()[1])


def _count_in_thousands(axes: mpl_axes.Axes) -> None:
  axes.margins(x=0.02)
  axes.xaxis.set_major_locator(mpl_ticker.MaxNLocator(5, integer=True))
  axes.xaxis.set_major_formatter(lambda value, _: _short(value))


def _short(step: float | int) -> str:
  """57000 as 57k, 1500 as 1.5k, 500 as 500."""
  return f"{step / 1000:g}k" if step >= 1000 else f"{step:g}"


def _add_perplexities(axes: mpl_axes.Axes) -> None:
  """Adds an axis of exp(loss) on the right, with round numbers."""
  # Within what float64 can hold, whatever matplotlib tries out.
  exp = lambda values: np.exp(np.minimum(values, 700))
  log = lambda values: np.log(np.maximum(values, 1e-300))
  right = axes.secondary_yaxis("right", functions=(exp, log))
  right.set_ylabel("perplexity")
  low, high = exp(np.array(axes.get_ylim()))
  decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.log10(high) + 1)
  ticks: list[float] = []
  for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
    if len(ticks) < 3:
      round_numbers = (f * decade for decade in decades for f in factors)
      ticks = [tick for tick in round_numbers if low <= tick <= high]
  if len(ticks) < 3:
    near = mpl_ticker.MaxNLocator(5, steps=(1, 2, 5, 10)).tick_values(low, high)
    ticks = [float(tick) for tick in near if low <= tick <= high]
  right.set_yticks(ticks, [f"{tick:,.12g}" for tick in ticks])
  right.minorticks_off()


def _array(values: object) -> np.ndarray:
  """An array of floats, NaN for null."""
  return np.array(values, float)
