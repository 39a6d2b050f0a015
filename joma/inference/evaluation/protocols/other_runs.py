"""Bytes beside quality of several models, each of a run of its own.

A model whose layers keep states holds the same bytes whatever the budget; one
with keys and values holds what a policy leaves it. Both are compared on the
same examples: runs of `launch.evaluate_cache` with equal tasks, lengths and
seeds.
"""

from collections.abc import Mapping, Sequence
import math
import pathlib
from typing import Any, NamedTuple

from joma.inference.evaluation import drawing
from joma.inference.evaluation import evaluate_config
from joma.systems.cache_policies import names as policy_names
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import report
from scansnap_jax.experiment import workdir as workdir_lib

# What decides which examples are read, and how.
_SAME = (
    "tasks",
    "num_seeds",
    "first_seed",
    "batch_size",
    "length",
    "reading",
    "num_pairs",
    "vocab_size",
    "filler",
)
# Accuracy that counts as equal.
_MARGIN = 0.02


class Entry(NamedTuple):
  """What one model and cache came to.

  Attributes:
    name: Of the run's folder, or `this run`.
    policy: As tables call it.
    slots: Of a KV head; None of a model that has states alone.
    quality: Mean, `low` and `high` of the accuracy.
    num_bytes: Of all caches of one text, which decides the order.
  """

  name: str
  policy: str
  slots: int | None
  quality: Mapping[str, float]
  num_bytes: int


def read(
    folders: Sequence[str],
    config: evaluate_config.EvaluateConfig,
    own: str = "",
) -> dict[str, dict[str, Any]]:
  """Returns the summaries of other runs by their folders' names.

  Args:
    folders: Their workdirs.
    config: Of this run.
    own: Name of this run's folder, which no other may have.

  Raises:
    UserError: A folder holds no finished run, or one of other examples, or two
      have one name.
  """
  wanted = workdir_lib.config_to_json(config)
  found: dict[str, dict[str, Any]] = {}
  for folder in folders:
    path = pathlib.Path(folder)
    if not (path / "summary.json").is_file():
      raise errors.UserError(
          f"beside={folder} holds no summary.json: give the folder of a run of"
          " evaluate_cache that has ended."
      )
    settings = json_file.read_object(path / "config.json")
    _check(folder, settings, wanted)
    name = path.resolve().name
    if name in found or name == own:
      raise errors.UserError(
          f"beside names two folders {name}: rename one of them."
      )
    found[name] = json_file.read_object(path / "summary.json")
  return found


def _check(
    folder: str, settings: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
  for key in _SAME:
    if settings.get(key) != wanted[key]:
      raise errors.UserError(
          f"beside={folder} was run with {key}={settings.get(key)}, and this"
          f" run has {wanted[key]}: only runs on the same examples can be"
          " compared."
      )


def entries(
    task: str,
    summaries: Mapping[str, Mapping[str, Any]],
    config: evaluate_config.EvaluateConfig,
) -> list[Entry]:
  """Returns all models and caches of a task, the fewest bytes first."""
  found = [
      Entry(
          name,
          drawing.label(row["policy"]),
          row["slots"] if _has_slots(row) else None,
          row["quality"],
          row["cache_bytes"] // config.batch_size,
      )
      for name, summary in summaries.items()
      for row in summary["tasks"][task]
      if not row.get("failed")
  ]
  return sorted(found, key=lambda entry: (entry.num_bytes, entry.name))


def _has_slots(row: Mapping[str, Any]) -> bool:
  """Whether any layer keeps tokens, so that some can be lost."""
  if "recall" not in row:
    return True
  mean = (row["recall"] or {}).get("mean")
  return mean is not None and math.isfinite(mean)


def table(rows: Sequence[Entry]) -> report.Table:
  """The table of a report."""
  cells = [
      (
          entry.name,
          entry.policy,
          "–" if entry.slots is None else entry.slots,
          entry.num_bytes,
          (
              f"{entry.quality['mean']:.3f}"
              f" [{entry.quality['low']:.3f}, {entry.quality['high']:.3f}]"
          ),
      )
      for entry in rows
  ]
  return report.Table(
      "Bytes of all caches of one text, of this run and of those beside it, the"
      " fewest first; accuracy with its 95 % interval over texts. A state has"
      " no slots: it is one size at every length.",
      ("run", "policy", "slots", "bytes", "accuracy"),
      cells,
  )


def lines(rows: Sequence[Entry]) -> list[str]:
  """The table in Markdown."""
  made = table(rows)
  return [
      f"| {' | '.join(map(str, cells))} |"
      for cells in (made.header, ["---"] * len(made.header), *made.rows)
  ]


def finding(rows: Sequence[Entry]) -> str:
  """Says which bytes each run's eviction needs to be as good as the others.

  Of every run whose full cache is beside: the fewest bytes with which its own
  policies answer as much as another run's full cache, .02 less at most.
  """
  full = policy_names.REFERENCE
  said = []
  for one in rows:
    if one.policy != drawing.label(full):
      continue
    level = one.quality["mean"] - _MARGIN
    for name in dict.fromkeys(row.name for row in rows if row.name != one.name):
      reach = [
          row
          for row in rows
          if row.name == name and row.quality["mean"] >= level
      ]
      least = reach[0] if reach else None
      said.append(
          f"{one.name} answers {one.quality['mean']:.3f} with"
          f" {one.num_bytes} bytes; {name} "
          + (
              f"as much first with {least.num_bytes}, {least.policy}"
              + (f" of {least.slots} slots." if least.slots else ".")
              if least
              else "never as much."
          )
      )
  return " ".join(said)
