"""Figure 3 of JoMA: what the lower MLP layer learns, V = U_C^T W.

V before and after the training of Figure 2 (`figure2`), as a matrix of tokens
and hidden nodes, and the first components of v_0, the node of the first class,
along training (https://arxiv.org/abs/2310.00535). With linear activation the
larger a component is, the faster it grows (Theorem 2), so that a node ends up
on fewer tokens: its effective number (sum_l v_l^2)^2 / sum_l v_l^4 falls.

Letters: R runs, S times, M tokens, K hidden nodes, C components shown.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from joma import config as config_lib
from joma.studies import figure2

_NUM_SHOWN = 4


def measure(
    config: config_lib.Figure3Config,
    *,
    on_metrics: Callable[[int, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
  """Trains the runs of Figure 2 and reads off V.

  Args:
    config: The settings.
    on_metrics: Called with the step and the first run's shown components.

  Returns:
    `steps`; for each mode: `first` and `last` V of the first run [M, K],
    `components` of its v_0 [S, C], `effective`, on how many tokens a node is,
    mean over nodes and runs [S]; and the finding.
  """
  summary: dict[str, Any] = {"steps": figure2.steps(config)}
  for mode, runs in figure2.run_all(config).items():
    v = np.asarray(runs.v)
    shown = v[0, :, :_NUM_SHOWN, 0]
    summary[mode] = {
        "first": v[0, 0],
        "last": v[0, -1],
        "components": shown,
        "effective": _effective_number(v).mean(axis=(0, 2)),
    }
  if on_metrics is not None:
    for i, step in enumerate(summary["steps"].tolist()):
      row = {
          f"{mode}_v_{c}0": summary[mode]["components"][i, c]
          for mode in figure2.MODES
          for c in range(_NUM_SHOWN)
      }
      on_metrics(step, row)
  return {**summary, "finding": _finding(summary)}


def _effective_number(v: np.ndarray) -> np.ndarray:
  """Computes (sum_l v_l^2)^2 / sum_l v_l^4 of each node: from 1 to M."""
  return np.sum(v**2, axis=-2) ** 2 / np.sum(v**4, axis=-2)


def _finding(summary: dict[str, Any]) -> str:
  parts = []
  for mode in figure2.MODES:
    effective = summary[mode]["effective"]
    top = int(effective.argmax())
    if 0 < top < len(effective) - 1:
      parts.append(
          f"first spread from {effective[0]:.1f} to {effective[top]:.1f} tokens"
          f" (step {summary['steps'][top]}) and then draw together on"
          f" {effective[-1]:.1f}"
      )
    else:
      parts.append(
          f"go from {effective[0]:.1f} to {effective[-1]:.1f} tokens in one"
          " direction"
      )
  return (
      f"Hidden nodes {parts[0]} in gaussian mode; in random mode they"
      f" {parts[1]} (effective numbers of components, mean over nodes and"
      " seeds)."
  )
