"""Scores of policies and budgets, task by task and in the mean.

Scores are in percent; intervals are Student's t at 95 % over texts. Text i of
each task was drawn with the same seed: the mean's interval is over texts whose
scores are means over tasks.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from jaxtyping import Float
import numpy as np

from joma.systems.cache_policies import names as policy_names
from scansnap_jax.experiment import intervals

Row = Mapping[str, Any]
MEAN = "mean"


@dataclasses.dataclass(frozen=True)
class Leaderboard:
  """What was scored.

  Attributes:
    tasks: All, in the order they were read.
    passed: Those that the full cache does not fail.
    scores: By policy and budget, then by task or `MEAN`: mean, low and high in
      percent.
  """

  tasks: tuple[str, ...]
  passed: tuple[str, ...]
  scores: Mapping[tuple[str, float], Mapping[str, Mapping[str, float]]]

  @property
  def policies(self) -> tuple[str, ...]:
    """All but the full cache, in order."""
    names = dict.fromkeys(policy for policy, _ in self.scores)
    return tuple(n for n in names if n != policy_names.REFERENCE)

  def budgets(self, policy: str) -> list[float]:
    """Those of a policy, ascending."""
    return sorted(budget for name, budget in self.scores if name == policy)


def make(rows: Sequence[Row], passes: float) -> Leaderboard:
  """Sums rows up.

  Args:
    rows: As `ruler_grid.measure` gives them.
    passes: Score of the full cache from which on a task counts.
  """
  full = {
      row["task"]: float(np.mean(row["scores"]))
      for row in rows
      if row["policy"] == policy_names.REFERENCE
  }
  passed = tuple(task for task, score in full.items() if score >= passes)
  of_setting: dict[tuple[str, float], dict[str, np.ndarray]] = {}
  for row in rows:
    setting = of_setting.setdefault((row["policy"], row["budget"]), {})
    setting[row["task"]] = 100 * np.asarray(row["scores"], np.float64)
  scores = {}
  for setting, by_task in of_setting.items():
    parts = {task: _interval(values) for task, values in by_task.items()}
    counted = [by_task[task] for task in passed]
    if counted:
      parts[MEAN] = _interval(np.mean(counted, axis=0))
    scores[setting] = parts
  return Leaderboard(tuple(full), passed, scores)


def _interval(values: Float[np.ndarray, "B"]) -> dict[str, float]:
  if len(values) < 2:
    mean = float(values.mean())
    return dict(mean=mean, low=mean, high=mean)
  return intervals.interval(values, least=0, most=100)
