"""Table, figures and report of `launch.evaluate_cache --tasks=ruler`."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from joma.inference.evaluation import drawing
from joma.inference.evaluation.protocols import drawing as ruler_drawing
from joma.inference.evaluation.protocols import leaderboard
from joma.systems.cache_policies import names as policy_names
from scansnap_jax.experiment import figures
from scansnap_jax.experiment import intervals
from scansnap_jax.experiment import report

_PROTOCOLS = {
    "agnostic": (
        "The context is read and compressed once, the question unknown;"
        " question and answer come on top, and evict nothing."
    ),
    "aware": (
        "Context and question are compressed together; the answer comes on"
        " top, and evicts nothing."
    ),
    "decoding": (
        "Tokens are read one by one through a cache of the target size, and"
        " so is the answer."
    ),
}


def write(
    workdir: pathlib.Path,
    summary: Mapping[str, Any],
    facts: Mapping[str, str],
    started: float,
) -> pathlib.Path:
  """Writes figures/, summary.json and report.html; returns the report's path.

  Args:
    workdir: The run's folder.
    summary: `rows` and `map` of `ruler_grid.measure`; `protocol`, `passes`.
    facts: What the report says of the run first.
    started: `time.monotonic()` at the start of the run.
  """
  board = leaderboard.make(summary["rows"], summary["passes"])
  found = finding(board, summary["protocol"])
  report.write_summary(workdir, report.to_json({"finding": [found], **summary}))
  save = lambda figure, name: figures.save(figure, workdir / "figures", name)[0]
  items: list[report.Table | report.Figure] = [
      report.Table(_caption(board, summary), *table(board))
  ]
  if board.passed:
    caption = (
        "Score by the share of tokens that is kept. Bands, of the mean alone:"
        " 95 % over texts."
    )
    png = save(ruler_drawing.draw(board), "scores")
    items.append(report.Figure(caption, png))
  if summary["map"]:
    png = save(ruler_drawing.draw_map(summary["map"]), "needle")
    items.append(report.Figure(_map_caption(summary["map"]), png))
  sections = [report.Section(f"RULER, {summary['protocol']}", found, items)]
  facts = {**facts, **report.run_facts(started)}
  return report.write(
      workdir, "What a KV cache can do without", facts, sections
  )


def finding(board: leaderboard.Leaderboard, protocol: str) -> str:
  """Says in a few sentences what was found."""
  failed = [task for task in board.tasks if task not in board.passed]
  lost = f" It fails {', '.join(failed)}, which no mean has." if failed else ""
  if not board.passed:
    return f"ruler, {protocol}: the full cache fails every task."
  mean = lambda setting: board.scores[setting][leaderboard.MEAN]["mean"]
  said = (
      f"ruler, {protocol}: the full cache scores"
      f" {mean((policy_names.REFERENCE, 1.0)):.1f} on"
      f" {', '.join(board.passed)}.{lost}"
  )
  budgets = sorted({b for name, b in board.scores if b < 1})
  for budget in budgets:
    best = max(board.policies, key=lambda name: mean((name, budget)))
    scores = {
        name: board.scores[name, budget][leaderboard.MEAN]
        for name in board.policies
    }
    near = [
        drawing.label(name)
        for name, score in scores.items()
        if name != best and intervals.overlap(score, scores[best])
    ]
    said += (
        f" With {100 * budget:g} % kept {drawing.label(best)}"
        f" {intervals.rank(f'{mean((best, budget)):.1f}', near)}."
    )
  return said


def table(
    board: leaderboard.Leaderboard,
) -> tuple[list[str], list[list[str]]]:
  """Returns header and cells: a row a policy and budget, a column a task."""
  marked = [
      task if task in board.passed else f"{task} (failed)"
      for task in board.tasks
  ]
  cells = []
  for (name, budget), scores in board.scores.items():
    row = [drawing.label(name), f"{100 * budget:g} %"]
    for task in (leaderboard.MEAN, *board.tasks):
      row.append(_cell(scores[task]) if task in scores else "–")
    cells.append(row)
  return ["policy", "kept", "mean", *marked], cells


def lines(board: leaderboard.Leaderboard) -> list[str]:
  """The table as Markdown."""
  header, cells = table(board)
  rows = [header, ["---"] * len(header), *cells]
  return ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def _cell(parts: Mapping[str, float]) -> str:
  half = max(parts["high"] - parts["mean"], parts["mean"] - parts["low"])
  return f"{parts['mean']:.1f} ± {half:.1f}"


def _caption(board: leaderboard.Leaderboard, summary: Mapping[str, Any]) -> str:
  number = len(summary["rows"][0]["scores"])
  length = summary["rows"][0]["length"]
  failed = " Where the full cache scores below"
  failed += (
      f" {100 * summary['passes']:g} a task has failed: other policies are"
  )
  failed += " not measured on it, and no mean has it."
  has_failed = len(board.passed) < len(board.tasks)
  return (
      f"{_PROTOCOLS[summary['protocol']]} Score in percent on {number} texts a"
      f" task of {length} tokens at most, ± the longer side of the 95 %"
      f" interval.{failed if has_failed else ''}"
  )


def _map_caption(rows: Sequence[Mapping[str, Any]]) -> str:
  kept = min(row["budget"] for row in rows)
  return (
      f"{rows[0]['task']}: score by the depth of the needle and the tokens of"
      f" the text, {100 * kept:g} % of them kept but for the full cache;"
      f" {len(rows[0]['scores'])} texts a square."
  )
