"""Figures, summary and report of language-model runs: of one, or of several.

`write` is for a run that has just finished; `compare` puts runs side by side
whose folders are there.
"""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from jaxtyping import Float
import numpy as np

from joma.systems.probes import names as probe_names
from joma.transformer.training import drawing
from joma.transformer.training import summary as summary_lib
from scansnap_jax.experiment import figures
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import report
from scansnap_jax.experiment.errors import UserError

_TITLE = "Attention of language models along training"


def write(
    workdir: pathlib.Path,
    run: Mapping[str, Any],
    attn_maps: Float[np.ndarray, "M L N T T"],
    *,
    facts: Mapping[str, str],
    started: float,
    reference_csv: str | None = None,
) -> pathlib.Path:
  """Writes figures/, summary.json and report.html of a finished run.

  Args:
    workdir: The run's folder.
    run: What `summary_lib.summarize_run` made; with `map_steps`, when each of
      the M maps was taken, and where they are known `map_text`, the sequence
      that they are of, `map_tokens`, its tokens, and `probes` and
      `named_probes`. Other entries come into summary.json as they are.
    attn_maps: Attention weights of one sequence, rows of queries.
    facts: What the report says of the run first.
    started: `time.monotonic()` at the start of the run.
    reference_csv: The authors' curves, see `summary_lib.read_reference`.

  Returns:
    The path of the report.

  Raises:
    UserError: `reference_csv` cannot be read.
  """
  groups = summary_lib.group_runs([run], _reference(reference_csv))
  numbers = summary_lib.summarize_maps(attn_maps, run["map_steps"])
  # Before anything is drawn, so that no drawing can cost the numbers.
  summary = {**run, "maps": numbers, "groups": groups}
  report.write_summary(workdir, summary)
  sections = [_losses(workdir, groups), _entropy(workdir, groups)]
  items: list[report.Figure | report.Table] = [
      _save(workdir, "probes", drawing.probes(groups[0]))
  ]
  if run.get("named_probes"):
    items.append(_named_probes(run))
  sections.append(report.Section("Probes", "", items))
  if len(attn_maps):
    sections.append(_maps(workdir, run, attn_maps, numbers))
  facts = {**facts, **report.run_facts(started)}
  return report.write(workdir, _TITLE, facts, sections)


def compare(
    workdir: pathlib.Path,
    runs: Sequence[pathlib.Path],
    *,
    facts: Mapping[str, str],
    started: float,
    reference_csv: str | None = None,
) -> pathlib.Path:
  """Writes figures/, summary.json and report.html of several runs.

  Those that differ in their seed alone become one curve with its spread.

  Args:
    workdir: Where to.
    runs: Folders of finished runs.
    facts: What the report says first.
    started: `time.monotonic()` at the start.
    reference_csv: The authors' curves.

  Returns:
    The path of the report.

  Raises:
    UserError: A folder has no summary, or a seed occurs twice.
  """
  summaries = [read_summary(run) for run in runs]
  groups = summary_lib.group_runs(summaries, _reference(reference_csv))
  summary: dict[str, Any] = {"runs": list(map(str, runs)), "groups": groups}
  has_rates = len({group["lr"] for group in groups}) > 1
  if has_rates:
    depths = sorted({group["num_layers"] for group in groups})
    summary["final_entropy"] = [
        {"num_layers": depth, **point}
        for depth in depths
        for point in drawing.final_entropies(groups, depth)
    ]
  report.write_summary(workdir, summary)
  sections = [_losses(workdir, groups), _entropy(workdir, groups)]
  if has_rates:
    items = [
        _save(workdir, "final_entropy", drawing.final_entropy(groups)),
        _table("After training.", summary["final_entropy"]),
    ]
    title = "Attention entropy against the learning rate"
    sections.append(report.Section(title, "", items))
  facts = {**facts, **report.run_facts(started)}
  return report.write(workdir, _TITLE, facts, sections)


def _reference(reference_csv: str | None) -> dict[Any, Any]:
  if reference_csv is None:
    return {}
  return summary_lib.read_reference(json_file.local_path(reference_csv))


def read_summary(folder: pathlib.Path) -> dict[str, Any]:
  """Reads the summary of a finished run of `launch.train_lm`.

  Raises:
    UserError: There is none, or it is of something else.
  """
  path = folder / "summary.json"
  try:
    summary = json_file.read_object(path)
  except UserError as error:
    raise UserError(
        f"{folder} holds no summary of a finished run: {error}"
    ) from error
  if "num_layers" not in summary:
    raise UserError(
        f"{folder} holds no summary of a finished run: {path} is not of"
        " train_lm."
    )
  return summary


def _losses(
    workdir: pathlib.Path, groups: Sequence[drawing.Group]
) -> report.Section:
  rows = []
  for group in groups:
    best = group["best_valid_loss"] or {"value": None, "step": None}
    value = best["value"]
    row = {
        "runs": report.as_is(drawing.describe(group, groups)),
        "seeds": len(group["seeds"]),
        "least validation loss": value,
        "perplexity": None if value is None else float(np.exp(value)),
        "at minibatch": best["step"],
        "tokens a second": group["tokens_per_sec"],
    }
    if (authors := group["authors"]) is not None:
      gaps = [
          abs(gap["valid_loss"])
          for gap in authors["differences"]
          if gap["valid_loss"] is not None
      ]
      row["authors' least"] = authors["best_valid_loss"]["value"]
      row["at their minibatch"] = authors["best_valid_loss"]["step"]
      row["largest difference at a minibatch"] = max(gaps, default=None)
    rows.append(row)
  items = [
      _save(workdir, "losses", drawing.losses(groups)),
      _table("Validation loss in nats per token, mean over seeds.", rows),
  ]
  return report.Section("Loss and perplexity", "", items)


def _entropy(
    workdir: pathlib.Path, groups: Sequence[drawing.Group]
) -> report.Section:
  rows = []
  for group in groups:
    theirs = (group["authors"] or {"layers": []})["layers"]
    for layer, ours in enumerate(group["layers"]):
      row = {"runs": report.as_is(drawing.describe(group, groups)), **ours}
      if theirs:
        names = ("start", "min", "min_step", "end")
        row |= {f"authors' {name}": theirs[layer][name] for name in names}
      rows.append(row)
  items = [
      _save(workdir, "entropy", drawing.entropy(groups)),
      _table(
          "Entropy in nats by layer: at the start, at its least and where that"
          " is, at the end, and end less least.",
          rows,
      ),
  ]
  text = (
      "Where attention becomes sparse and then dense again, the entropy falls"
      " and rebounds."
  )
  return report.Section("Attention entropy", text, items)


def _maps(
    workdir: pathlib.Path,
    run: Mapping[str, Any],
    attn_maps: Float[np.ndarray, "M L N T T"],
    numbers: Sequence[Mapping[str, Any]],
) -> report.Section:
  shown = set(drawing.shown_maps(*attn_maps.shape[1:3]))
  rows = [row for row in numbers if (row["layer"], row["head"]) in shown]
  figure = drawing.maps(
      attn_maps, run["map_steps"], tokens=run.get("map_tokens")
  )
  items = [
      _save(workdir, "maps", figure),
      _table(
          "Of these maps, means over queries: entropy in nats, largest weight,"
          " weight of the first key.",
          rows,
      ),
  ]
  text = report.as_is(run.get("map_text", ""))
  text = f"The sequence: {text}" if text else ""
  return report.Section("Attention maps", text, items)


def _named_probes(run: Mapping[str, Any]) -> report.Table:
  """The probes that were asked for by name, before training and after it."""
  rows = []
  for layer in range(run["num_layers"]):
    row: dict[str, Any] = {"layer": layer}
    for name, curves in run["named_probes"].items():
      row[f"{name}, before"] = curves[layer][0]
      row[f"{name}, after"] = curves[layer][-1]
    rows.append(row)
  return _table(
      "Probes by layer, before training and after it, means over heads."
      f" {probe_names.captions(run['probes'])}",
      rows,
  )


def _save(
    workdir: pathlib.Path, name: str, figure: drawing.mpl_figure.Figure
) -> report.Figure:
  png, _ = figures.save(figure, workdir / "figures", name)
  return report.Figure(drawing.CAPTIONS[name], png)


def _table(caption: str, rows: Sequence[Mapping[str, Any]]) -> report.Table:
  """Lays rows out; what some rows lack is a dash there."""
  header = list(dict.fromkeys(name for row in rows for name in row))
  cells = [[_text(row.get(name)) for name in header] for row in rows]
  return report.Table(
      caption, [name.replace("_", " ") for name in header], cells
  )


def _text(value: object) -> str:
  if isinstance(value, float):
    return f"{value:.4g}"
  return "–" if value is None else str(value)
