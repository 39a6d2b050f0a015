"""Summary, figures and report of `launch.evaluate_cache`."""

from collections.abc import Mapping, Sequence
import math
import pathlib
from typing import Any

from joma.inference.evaluation import drawing
from joma.inference.evaluation import evaluate_config
from joma.inference.evaluation.protocols import other_runs
from joma.systems.cache_policies import names as policy_names
from scansnap_jax.experiment import figures
from scansnap_jax.experiment import intervals
from scansnap_jax.experiment import report

Row = Mapping[str, Any]

# Accuracy of the full cache from which on policies are ranked, as in RULER.
_PASSES = 0.5


def write(
    workdir: pathlib.Path,
    summary: Mapping[str, Any],
    facts: Mapping[str, str],
    started: float,
    beside: Mapping[str, Sequence[other_runs.Entry]] | None = None,
) -> pathlib.Path:
  """Writes figures/, summary.json and report.html; returns the report's path.

  Args:
    workdir: The run's folder.
    summary: `tasks`, rows of each as `evaluate_grid.measure` gives them;
      `training`, its losses or None; `length`, tokens of a text.
    facts: What the report says of the run first.
    started: `time.monotonic()` at the start of the run.
    beside: By task, this run and others by bytes; None is no other.
  """
  beside = beside or {}
  findings = [finding(task, rows) for task, rows in summary["tasks"].items()]
  findings += [other_runs.finding(rows) for rows in beside.values()]
  summary = {"finding": findings, **summary}
  report.write_summary(workdir, report.to_json(summary))
  sections = []
  for task, rows in summary["tasks"].items():
    png, _ = figures.save(drawing.draw(rows), workdir / "figures", task)
    sections.append(
        report.Section(
            task.replace("_", " "),
            finding(task, rows),
            [
                report.Figure(_caption(task, rows, summary["length"]), png),
                _quality(task, rows),
                _expense(rows),
                *([other_runs.table(beside[task])] if task in beside else []),
            ],
        )
    )
  facts = {**facts, **_training(summary), **report.run_facts(started)}
  title = "Which tokens a KV cache keeps, and what that costs"
  return report.write(workdir, title, facts, sections)


def finding(task: str, rows: Sequence[Row]) -> str:
  """Says in a sentence or two what a task showed."""
  key = "perplexity" if "perplexity" in rows[0] else "quality"
  failed = [row for row in rows if row.get("failed")]
  rows = [row for row in rows if not row.get("failed")]
  least = min(row["slots"] for row in rows)
  small = [row for row in rows if row["slots"] == least]
  reference = [row for row in rows if row["policy"] == policy_names.REFERENCE]
  full = [_number(row[key]["mean"]) for row in reference]
  if full and key == "quality" and reference[0][key]["mean"] < _PASSES:
    said = [
        f"{task}: the full cache fails with {full[0]}: no policy is ranked."
    ]
  else:
    said = [f"{task}: full cache {full[0]}." if full else f"{task}:"]
    said += [_best(small, key), *_compare_recall(rows)]
  said += [
      f"{drawing.label(row['policy'])} with {row['slots']} slots failed:"
      f" {row['failed']}."
      for row in failed
  ]
  return " ".join(said)


def _best(small: Sequence[Row], key: str) -> str:
  """Names the best of the fewest slots, and what is not apart from it."""
  best = (min if key == "perplexity" else max)(
      small, key=lambda row: row[key]["mean"]
  )
  beside = [
      f"{row['policy']} {_number(row[key]['mean'])}"
      for row in small
      if row["policy"] in policy_names.BESIDE and row is not best
  ]
  near = [
      drawing.label(row["policy"])
      for row in small
      if row is not best and intervals.overlap(row[key], best[key])
  ]
  return (
      f"With {best['slots']} slots, {100 * best['budget']:.3g} % of the text,"
      f" {drawing.label(best['policy'])}"
      f" {intervals.rank(_number(best[key]['mean']), near)}"
      + (f", beside {' and '.join(beside)}." if beside else ".")
  )


def _compare_recall(rows: Sequence[Row]) -> list[str]:
  """Gold-slot recall by attention beside that by place, budget by budget."""
  names = [policy_names.label(name) for name in policy_names.COMPARED]
  of = lambda name: {
      row["slots"]: row
      for row in rows
      if row["policy"] == name and "recall" in row
  }
  ours, theirs = map(of, policy_names.COMPARED)
  both = sorted(set(ours) & set(theirs))
  if not both:
    return []
  mean = lambda row: row["recall"]["mean"]
  less = [n for n in both if mean(ours[n]) < mean(theirs[n])]
  if not less:
    return [
        f"{names[0]} keeps at least as many gold tokens as {names[1]} at every"
        " budget."
    ]
  listed = ", ".join(
      f"{mean(ours[n]):.2f} against {mean(theirs[n]):.2f} with {n} slots"
      + ("" if _apart(ours[n], theirs[n]) else " (intervals overlap)")
      for n in less
  )
  share = theirs[less[0]]["gold_in_sinks"]
  return [
      f"{names[0]} keeps fewer gold tokens than {names[1]} at some budgets:"
      f" {listed}; {100 * share:.0f} % of them stand in {names[1]}'s sinks,"
      " the first tokens, and never leave."
  ]


def _apart(one: Row, other: Row) -> bool:
  return one["recall"]["high"] < other["recall"]["low"]


def _caption(task: str, rows: Sequence[Row], length: int) -> str:
  num_texts = rows[0]["num_texts"]
  recall = (
      ""
      if "perplexity" in rows[0]
      else (
          " Middle: tokens that hold the answer which are in the cache when it"
          " is asked, mean over layers and KV heads."
      )
  )
  what = "Perplexity" if "perplexity" in rows[0] else "Accuracy"
  return (
      f"{what} on {num_texts} texts of {length} tokens at most, by the slots of"
      " each KV head and by the bytes of keys, values and scores that a decode"
      f" step moves.{recall} Bands: 95 % confidence over texts. Dotted: the"
      " full cache."
  )


def _quality(task: str, rows: Sequence[Row]) -> report.Table:
  is_text = task == evaluate_config.PERPLEXITY
  header = ["policy", "slots"]
  header += ["perplexity", "of full"] if is_text else ["accuracy", "gold kept"]
  header += ["attention kept"]
  cells = []
  for row in rows:
    keys = ("perplexity", "ratio") if is_text else ("quality", "recall")
    mass = row["kept_mass"]
    cells.append((
        drawing.label(row["policy"]),
        row["slots"],
        *("failed" if row.get("failed") else _interval(row[k]) for k in keys),
        "–" if mass is None else _number(mass["mean"]),
    ))
  caption = (
      "Mean and 95 % interval. Attention kept: of all attention of the text,"
      " the share that went to tokens that are kept at its end, where the"
      " policy's score says so."
  )
  return report.Table(caption, header, cells)


def _expense(rows: Sequence[Row]) -> report.Table:
  header = (
      "policy",
      "slots",
      "MB a step",
      "of it cache",
      "MB of cache",
      "ms a step",
      "compilations",
  )
  cells = [
      (
          drawing.label(row["policy"]),
          row["slots"],
          f"{row['step_bytes'] / 1e6:.4g}",
          f"{row['step_cache_bytes'] / 1e6:.4g}",
          f"{row['cache_bytes'] / 1e6:.4g}",
          "–" if row["ms_per_step"] is None else f"{row['ms_per_step']:.3g}",
          row["compilations"],
      )
      for row in rows
  ]
  caption = (
      "Bytes that a decode step moves, by the cost model; bytes that the arrays"
      " of the cache hold; measured median time of a step; programs compiled"
      " for all texts."
  )
  return report.Table(caption, header, cells)


def _training(summary: Mapping[str, Any]) -> dict[str, str]:
  training = summary["training"]
  if training is None:
    return {}
  losses = training["losses"]
  return {"trained here": f"loss {losses[0]:.3f} to {losses[-1]:.3f} nats"}


def _interval(parts: Mapping[str, float | int]) -> str:
  if math.isnan(parts["mean"]):
    return "state"  # A mixer's: no token of it is kept or lost.
  half = (parts["high"] - parts["low"]) / 2
  return f"{_number(parts['mean'])} ± {_number(half)}"


def _number(value: float | int) -> str:
  return f"{value:.2f}" if value >= 10 else f"{value:.3f}"
