"""Number, summary and report of `launch.bridge`."""

from collections.abc import Mapping
import pathlib
from typing import Any

import numpy as np

from joma.inference.bridge import config as bridge_config
from joma.inference.bridge import drawing
from joma.systems.cache_policies import names as policy_names
from scansnap_jax.experiment import figures
from scansnap_jax.experiment import intervals
from scansnap_jax.experiment import report

_SUM, _MEAN = bridge_config.RUNNING_SUM, bridge_config.RUNNING_MEAN
Panels = Mapping[str, Mapping[str, Any]]


def summarize(panels: Panels, named: Mapping[str, Any]) -> dict[str, Any]:
  """Computes every interval at the end, and says what was found.

  Args:
    panels: By a name of `drawing.TITLES`, what the measurements give; the
      last one is what the number is of.
    named: Types that the theory ranks first and last.

  Returns:
    `finding`; `number`, the recall of the theory on the last panel with `low`
    and `high`; `over_frequency`, and `over_` with the names of the running
    scores, the same of its difference to those predictors, run by run;
    `at_end`, recalls by panel and predictor; `panels` and `named`.
  """
  last = panels[list(panels)[-1]]
  ends = {
      name: {key: _at_end(panel, key) for key in panel["recall"]}
      for name, panel in panels.items()
  }
  found = {
      "number": _at_end(last, "theory"),
      "over_frequency": _gain(last, "frequency"),
      f"over_{_SUM}": _gain(last, _SUM),
      f"over_{_MEAN}": _gain(last, _MEAN),
      "partial": intervals.interval(
          np.asarray(last["partial"])[:, -1], least=-1, most=1
      ),
      "at_end": ends,
      "panels": panels,
      "named": named,
  }
  return {"finding": _finding(found, last), **found}


def _at_end(panel: Mapping[str, Any], name: str) -> dict[str, float]:
  values = np.asarray(panel["recall"][name])[:, -1]
  return intervals.interval(values, least=0, most=1)


def _gain(panel: Mapping[str, Any], other: str) -> dict[str, float]:
  recall = panel["recall"]
  gain = np.asarray(recall["theory"]) - np.asarray(recall[other])
  return intervals.interval(gain[:, -1])


def _finding(found: Mapping[str, Any], last: Mapping[str, Any]) -> str:
  gains = {
      name: intervals.text(found[f"over_{name}"])
      for name in ("frequency", _SUM, _MEAN)
  }
  policy, over = policy_names.label(_SUM), found["over_frequency"]
  verdict = "cannot be told from what"
  if over["low"] > 0:
    verdict = "is more than"
  elif over["high"] < 0:
    verdict = "is less than"
  ceiling = found["at_end"]["one_layer"]["type"]["mean"]
  return (
      "From co-occurrence alone the theory names"
      f" {intervals.text(found['number'])} of a trained Transformer's heavy"
      f" hitters (chance {last['chance']:.3f}). This {verdict} the frequency of"
      f" tokens names: the difference is {gains['frequency']}. The difference"
      f" to {policy}'s running sum is {gains[_SUM]}, to its running mean"
      f" {gains[_MEAN]}. Given frequency, the theory's rank correlation"
      " with the attention that types get is"
      f" {intervals.text(found['partial'])}. In one layer on its own data it"
      f" names {intervals.text(found['at_end']['one_layer']['theory'])} of them"
      f" ({ceiling:.3f} is possible)."
  )


def write(
    workdir: pathlib.Path,
    summary: Mapping[str, Any],
    facts: Mapping[str, str],
    started: float,
) -> pathlib.Path:
  """Writes figures/, summary.json and report.html; returns the report's path.

  Args:
    workdir: The run's folder.
    summary: As `summarize` gives it.
    facts: What the report says of the run first.
    started: `time.monotonic()` at the start of the run.
  """
  report.write_summary(workdir, summary)
  figure = drawing.draw(summary["panels"])
  png, _ = figures.save(figure, workdir / "figures", "bridge")
  items = [report.Figure(caption(summary), png), _ends(summary)]
  section = report.Section(
      "Heavy hitters, predicted and found",
      f"{summary['finding']}\n\n{report.as_is(_named(summary['named']))}",
      items,
  )
  title = "From co-occurrence to heavy hitters"
  facts = {**facts, **report.run_facts(started)}
  return report.write(workdir, title, facts, [section])


def caption(summary: Mapping[str, Any]) -> str:
  """Says what the figure shows."""
  sizes = ", ".join(
      f"{panel['num_kept']} of {panel['num_candidates']} ({title})"
      for title, panel in (
          (drawing.TITLES[name], panel)
          for name, panel in summary["panels"].items()
      )
  )
  return (
      "Heavy hitters are the tokens of a sequence's first half that its second"
      f" half attends to most: {sizes}. Shown is which share of them is among"
      " as many tokens that each predictor ranks highest, along training. The"
      " theory sees token statistics, never a model;"
      f" {policy_names.label(_SUM)} sees the attention of the first half."
      " Dotted: chance. Bands: 95 % intervals over runs."
  )


def _ends(summary: Mapping[str, Any]) -> report.Table:
  panels = summary["at_end"]
  rows = [
      (
          label,
          *(
              intervals.text(panel[name]) if name in panel else "–"
              for panel in panels.values()
          ),
      )
      for name, label in drawing.labels().items()
  ]
  header = ("predictor", *(drawing.TITLES[name] for name in panels))
  return report.Table("Recall after training, 95 % interval.", header, rows)


def _named(named: Mapping[str, Any]) -> str:
  listed = lambda names: " ".join(repr(name) for name in names)
  return (
      "Of the frequent tokens the theory ranks highest"
      f" {listed(named['highest'])}, and lowest {listed(named['lowest'])}."
  )
