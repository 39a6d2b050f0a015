"""Figure, summary and report of `launch.rope_extension`."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from matplotlib import figure as mpl_figure
from matplotlib import lines as mpl_lines
from matplotlib import ticker as mpl_ticker
import numpy as np

from scansnap_jax.experiment import figures
from scansnap_jax.experiment import report

Summary = Mapping[str, Any]

_LABELS = {
    "plain": "plain RoPE",
    "linear": "interpolation",
    "ntk": "NTK-aware",
    "yarn": "YaRN",
    "plain_tuned": "plain RoPE, fine-tuned",
    "linear_tuned": "interpolation, fine-tuned",
}
_LOOKS = {
    "plain": figures.CurveStyle("#D55E00", "s", "-"),
    "linear": figures.CurveStyle("#0072B2", "o", "-"),
    "ntk": figures.CurveStyle("#009E73", "^", "-"),
    "yarn": figures.CurveStyle("#CC79A7", "D", "-"),
    "plain_tuned": figures.CurveStyle("#D55E00", "s", (0, (3, 1, 1, 1))),
    "linear_tuned": figures.CurveStyle("#0072B2", "o", (0, (3, 1, 1, 1))),
}


def write(
    workdir: pathlib.Path,
    summary: Summary,
    facts: Mapping[str, str],
    started: float,
) -> pathlib.Path:
  """Writes figures/, summary.json and report.html; returns the report's path.

  Args:
    workdir: The run's folder.
    summary: As `joma.transformer.rope.extension.measure` gives it.
    facts: What the report says of the run first.
    started: `time.monotonic()` at the start of the run.
  """
  summary = report.write_summary(workdir, summary)
  png, _ = figures.save(draw(summary), workdir / "figures", "rope_extension")
  items = [report.Figure(caption(summary), png), _table(summary)]
  section = report.Section(
      f"Reading {summary['factor']} times the window", summary["finding"], items
  )
  facts = {
      **facts,
      "corpus": json.dumps(summary["corpus"]),
      **report.run_facts(started),
  }
  title = "Rotary positions beyond the window of training"
  return report.write(workdir, title, facts, [section])


def draw(summary: Summary) -> mpl_figure.Figure:
  """Draws perplexity against position, one curve a kind of frequencies."""
  positions = np.array(summary["positions"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 3.2)
    axes = figure.subplots()
    for name, look in _LOOKS.items():
      curve = summary["curves"][name]
      loss = np.array(curve["loss"])
      every = figures.sparsely(len(positions), look)
      axes.plot(
          positions,
          np.exp(loss),
          **look._asdict(),
          markevery=every,
          label=_LABELS[name],
      )
      low, high = np.exp(curve["low"]), np.exp(curve["high"])
      figures.shade(axes, positions, low, high, look)
    window = summary["window"]
    axes.axvline(window, color="black", linewidth=0.6)
    axes.axhline(
        np.exp(summary["seen"]), color="black", linestyle=":", linewidth=0.8
    )
    axes.set(
        xlabel="position",
        ylabel="perplexity",
        xlim=(0, summary["factor"] * window),
        yscale="log",
    )
    axes.set_xticks(window * np.arange(summary["factor"] + 1))
    axes.yaxis.set_major_locator(mpl_ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(mpl_ticker.NullLocator())
    entries = figures.legend_entries(axes)
    entries["second half of the window"] = mpl_lines.Line2D(
        [], [], color="black", linestyle=":", linewidth=0.8
    )
    figures.put_legend_above(figure, entries)
  return figure


def caption(summary: Summary) -> str:
  """Says what the figure shows."""
  return (
      "Perplexity against position on the validation text, for a model trained"
      f" on texts of {summary['window']} tokens (line). Frequencies are changed"
      f" for {summary['factor']} times as many: without training, and after"
      f" {summary['tuning_steps']} steps on texts of that length. Mean over"
      f" {summary['num_texts']} texts and neighbouring positions; bands: 95 %"
      " confidence. Dotted: what the model reaches on the second half of its"
      " window."
  )


def _table(summary: Summary) -> report.Table:
  rows = [
      (
          label,
          f"{np.exp(summary['curves'][name]['within']):.2f}",
          f"{np.exp(summary['curves'][name]['beyond']):.2f}",
          f"{np.exp(summary['curves'][name]['loss'][-1]):.2f}",
      )
      for name, label in _LABELS.items()
  ]
  window, factor = summary["window"], summary["factor"]
  header = (
      "frequencies",
      f"{window // 2} to {window}",
      f"{window} to {factor * window}",
      "at the end",
  )
  return report.Table("Perplexity by position.", header, rows)
