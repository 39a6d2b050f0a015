"""Figures, summary and report of `launch.contextual_sparsity`."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import ticker as mpl_ticker
import numpy as np

from joma.inference.sparsity.study import method_report
from scansnap_jax.experiment import figures
from scansnap_jax.experiment import report
from scansnap_jax.experiment.venues import edges

Summary = Mapping[str, Any]
# Label and look of each rule.
Rules = Mapping[str, tuple[str, figures.CurveStyle]]

# Of figures: perplexities above so many times the dense one lie at the edge.
_HIGHEST = 2.0

_NEURONS = {
    "predicted": ("predicted", figures.CurveStyle("#D55E00", "s", "-")),
    "calibrated": (
        "predicted, calibrated",
        figures.CurveStyle("#CC79A7", "P", (0, (5, 1.2))),
    ),
    "griffin": ("GRIFFIN", figures.CurveStyle("#0072B2", "o", "-")),
    "cats": ("CATS", figures.CurveStyle("#009E73", "^", "-")),
    "teal": ("TEAL", figures.CurveStyle("#E69F00", "D", "-")),
    "oracle": ("oracle", figures.CurveStyle("black", "v", (0, (3, 1, 1, 1)))),
    "random": ("random", figures.CurveStyle("#7A7A7A", "X", (0, (1, 1)))),
}
_HEADS = {
    "heads": ("predicted", _NEURONS["predicted"][1]),
    "heads, missing keys zero": (
        "predicted, missing keys zero",
        figures.CurveStyle("#56B4E9", "p", (0, (5, 1.2))),
    ),
    "heads, oracle": ("oracle", _NEURONS["oracle"][1]),
    "heads, random": ("random", _NEURONS["random"][1]),
}
_TEXT = (
    "The first part of each text is a prompt, read densely; perplexity is that"
    " of the rest, of whose tokens each computes what its rule chooses. Weights"
    " read are those of one decoding step of one text, predictors included, as"
    " a share of the dense model's. GRIFFIN chooses once, by the prompt; CATS"
    " and TEAL keep what is above thresholds, calibrated on other texts; the"
    " oracle knows the strongest neurons, which no method can before it has"
    " computed them. A batch reads the union of what its texts choose."
)


def write(
    workdir: pathlib.Path,
    summary: Summary,
    facts: Mapping[str, str],
    started: float,
) -> pathlib.Path:
  """Writes figures/, summary.json and report.html; returns the report's path.

  Args:
    workdir: The run's folder.
    summary: As `joma.inference.sparsity.study.contextual_study.study` gives it.
    facts: What the report says of the run first.
    started: `time.monotonic()` at the start of the run.
  """
  # NaN, of measures with nothing to divide by, becomes null.
  summary = report.write_summary(workdir, report.to_json(summary))
  folder = workdir / "figures"
  sections = _of_rules(summary, folder) if summary["rows"] else []
  if summary["methods"]:
    figure, _ = figures.save(method_report.draw(summary), folder, "methods")
    drawn = report.Figure(method_report.caption(summary), figure)
    sections.append(method_report.section(summary, drawn))
  facts = {
      **facts,
      **{name: _show(value) for name, value in summary["facts"].items()},
      **(_capture_facts(summary) if summary["rows"] else {}),
      **report.run_facts(started),
  }
  title = "Contextual sparsity: what a token does not need to compute"
  return report.write(workdir, title, facts, sections)


def _of_rules(summary: Summary, folder: pathlib.Path) -> list[report.Section]:
  """Sections of rules that choose units."""
  curves, _ = figures.save(draw(summary), folder, "quality_against_weights")
  layers, _ = figures.save(draw_layers(summary), folder, "layers")
  return [
      report.Section(
          "Quality against weights read",
          f"{summary['finding']}\n\n{_TEXT}",
          [
              report.Figure(caption(summary), curves),
              _table(summary, _NEURONS, "Neurons."),
              _table(summary, _HEADS, "Heads."),
          ],
      ),
      report.Section(
          "Layers", items=[report.Figure(_layers_caption(summary), layers)]
      ),
  ]


def _capture_facts(summary: Summary) -> dict[str, str]:
  return {
      "captured": (
          f"{summary['capture_tokens']} tokens,"
          f" {summary['capture_bytes'] / 1e6:.1f} MB"
      ),
      "neurons of a block": str(summary["block_size"]),
      "label": summary["label"],
  }


def _show(value: object) -> str:
  return value if isinstance(value, str) else json.dumps(value)


def draw(summary: Summary) -> mpl_figure.Figure:
  """Draws perplexity against weights read: of the MLPs, and by heads of all."""
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 3.3)
    left, right = figure.subplots(1, 2, sharey=True)
    dense = summary["dense"]["perplexity"]
    left.set_ylim(_low(summary), _HIGHEST * dense)  # Of both.
    _curves(left, summary, _NEURONS, "mlp_weights")
    _curves(right, summary, _HEADS, "weights")
    for axes in (left, right):
      axes.axhline(dense, color="black", linewidth=0.6)
      axes.xaxis.set_major_locator(mpl_ticker.MaxNLocator(7, steps=(1, 2, 5)))
      axes.xaxis.set_major_formatter(mpl_ticker.PercentFormatter(1, decimals=0))
    left.set(
        xlabel="MLP weights read",
        ylabel="perplexity",
        xlim=(0, 1.25),
        title="Neurons",
    )
    right.set(xlabel="weights read", title="Heads")
    figures.put_legend_above(figure, figures.legend_entries(left, right))
  return figure


def _low(summary: Summary) -> float | int:
  dense = summary["dense"]["perplexity"]
  least = min(row["perplexity"] for row in summary["rows"])
  return min(least, dense) - 0.03 * dense


def _curves(
    axes: mpl_axes.Axes, summary: Summary, rules: Rules, across: str
) -> None:
  for name, (label, look) in rules.items():
    rows = _rows_of(summary, name)
    x = np.array([row[across] for row in rows])
    y = np.array([row["perplexity"] for row in rows])
    axes.plot(x, y, **look._asdict(), label=label)
    edges.mark_above(axes, x, y, look.color)
    dense = summary["dense"]["perplexity"]
    low, high = (
        dense * (1 + np.array([row[f"change_{side}"] for row in rows]))
        for side in ("low", "high")
    )
    figures.shade(axes, x, low, high, look)


def _rows_of(summary: Summary, name: str) -> list[Mapping[str, Any]]:
  rows = [row for row in summary["rows"] if row["rule"] == name]
  return sorted(rows, key=lambda row: row["weights"])


def draw_layers(summary: Summary) -> mpl_figure.Figure:
  """Draws what the predicted choice finds in each layer."""
  row = layers_row(summary)
  names = {
      "recall": ("recall", _NEURONS["predicted"][1]),
      "precision": ("precision", _NEURONS["griffin"][1]),
      "mass_recall": ("activation mass", _NEURONS["cats"][1]),
      "kept": ("chosen", _NEURONS["oracle"][1]),
      "union": ("chosen by some text", _NEURONS["random"][1]),
      "overlap": ("chosen again", _NEURONS["teal"][1]),
  }
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.8)
    axes = figure.subplots()
    for name, (label, look) in names.items():
      values = [
          np.nan if value is None else value for value in row["layers"][name]
      ]
      axes.plot(np.arange(len(values)), values, **look._asdict(), label=label)
    axes.set(xlabel="layer", ylabel="share", ylim=(0, 1.02))
    edges.count_layers(axes, len(row["layers"]["recall"]))
    figures.put_legend_above(figure, figures.legend_entries(axes))
  return figure


def layers_row(summary: Summary) -> Mapping[str, Any]:
  """The calibrated choice that is drawn by layer: that nearest to recall .9."""
  rows = [row for row in summary["rows"] if row["rule"] == "calibrated"]
  return min(rows, key=lambda row: abs(row["share"] - 0.9))


def caption(summary: Summary) -> str:
  """Says what the first figure shows."""
  return (
      "Perplexity against weights that a decoding step reads, neurons left out"
      " (left) and heads (right). Line: the dense model,"
      f" {summary['dense']['perplexity']:.4g}. Bands: 95 % confidence of the"
      " change, over texts, the same for all rules"
      f" ({summary['num_eval_tokens']} tokens). Open triangles at the upper"
      f" edge: above {_HIGHEST:g} times the dense perplexity."
  )


def _layers_caption(summary: Summary) -> str:
  row = layers_row(summary)
  return (
      "What the predicted choice finds in each layer, with thresholds that are"
      f" calibrated to a recall of {row['share']:g} on other texts: neurons"
      " that count and are chosen (recall), chosen ones that count (precision),"
      " their part of the activations' absolute values, how many are chosen by"
      " a token, by some text of a batch, and again by the next token."
  )


def _table(summary: Summary, rules: Rules, title: str) -> report.Table:
  header = ("rule", "share", "perplexity", "change", "weights read")
  measures = ("recall", "precision", "mass_recall", "output_error", "kept")
  measures += ("union", "overlap")
  header += (*(name.replace("_", " ") for name in measures),)
  rows = [
      (
          label,
          f"{row['share']:g}",
          f"{row['perplexity']:.4g}",
          _percents(row),
          f"{100 * row['weights']:.1f} %",
          *(_number(row[name]) for name in measures),
      )
      for name, (label, _) in rules.items()
      for row in sorted(_rows_of(summary, name), key=lambda row: row["share"])
  ]
  text = (
      f"{title} Share: of what is kept, or the recall that thresholds are"
      " calibrated to. Change of perplexity with its 95 % interval; weights"
      " read of all that the model has; measures over all layers."
  )
  return report.Table(text, header, rows)


def _percents(row: Mapping[str, Any]) -> str:
  low, high = 100 * row["change_low"], 100 * row["change_high"]
  return f"{100 * row['change']:+.1f} % ({low:+.1f} to {high:+.1f})"


def _number(value: float | int | None) -> str:
  return "–" if value is None else f"{value:.3f}"
