"""Figure 3 of JoMA: what the lower MLP layer learns, V = U_C^T W.

V before and after the training of Figure 2 (`figure2`), as a matrix of tokens
and hidden nodes, and the first components of v_0, the node of the first class,
along training (https://arxiv.org/abs/2310.00535). With linear activation the
larger a component is, the faster it grows (Theorem 2), so that a node ends up
on fewer tokens: its effective number (sum_l v_l^2)^2 / sum_l v_l^4 falls.

Paper's settings: those of Figure 2.

Letters as in `joma.studies`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epy

from joma.studies import study as study_lib
from joma.studies.figures import figure2

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import drawing
  from joma.theory import context_runs
  from scansnap_jax.experiment import figures

_NUM_SHOWN = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure3Config(figure2.Figure2Config):
  """Lower MLP weights along training (Figure 3); the runs of Figure 2.

  Attributes:
    num_seeds: Runs of either mode; the first one's weights are shown.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Full-batch steps.
    record_every: Steps between measurements; divides num_steps.
    step_size: Learning rate of W and z.
    temperature: T of softmax attention.
  """


def measure(
    config: Figure3Config,
    *,
    on_metrics: study_lib.OnMetrics | None = None,
) -> dict[str, Any]:
  """Trains the runs of Figure 2 and reads off V.

  Args:
    config: The settings.
    on_metrics: Called with the step and the first run's shown components.

  Returns:
    `steps`; for each mode: `first` and `last` V of the first run [M, F],
    `components` of its v_0 [S, J], `effective`, on how many tokens a node is,
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
  curves = {
      f"{mode}_v_{c}0": summary[mode]["components"][:, c]
      for mode in context_runs.MODES
      for c in range(_NUM_SHOWN)
  }
  study_lib.emit(on_metrics, summary["steps"], curves)
  return {**summary, "finding": _finding(summary)}


def _effective_number(v: np.ndarray) -> np.ndarray:
  """Computes (sum_l v_l^2)^2 / sum_l v_l^4 of each node: from 1 to M."""
  return np.sum(v**2, axis=-2) ** 2 / np.sum(v**4, axis=-2)


def _finding(summary: dict[str, Any]) -> str:
  parts = []
  for mode in context_runs.MODES:
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


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws V at start and end, components of v_0 and effective numbers."""
  steps = np.asarray(summary["steps"])
  looks = drawing.looks(4)
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 4.4)
    parts = figure.subfigures(2, 1, squeeze=False)[:, 0]
    for part, (mode, title) in zip(
        parts, drawing.MODE_TITLES.items(), strict=True
    ):
      part.suptitle(title)
      first, last, components, effective = part.subplots(
          1, 4, width_ratios=(1, 1, 1.35, 1.35)
      )
      for axes, name, when in (
          (first, "first", "start"),
          (last, "last", f"step {steps[-1]}"),
      ):
        matrix = np.abs(summary[mode][name])
        image = figures.draw_heat_map(axes, matrix, float(matrix.max()))
        axes.set(title=f"$|v_{{lk}}|$, {when}", xlabel="node $k$")
        part.colorbar(image, ax=axes, location="bottom", aspect=12, pad=0.02)
      first.set_ylabel("token $l$")
      shown = np.asarray(summary[mode]["components"])
      for c, look in enumerate(looks[: shown.shape[1]]):
        drawing.draw_curve(components, steps, shown[:, c], look, f"$l={c}$")
      components.set(title="$v_{l0}$", xlabel="step", xlim=(0, steps[-1]))
      legend = components.legend(
          loc="upper center",
          bbox_to_anchor=(0.5, -0.38),
          ncols=4,
          columnspacing=0.6,
          handlelength=1.4,
          handletextpad=0.3,
      )
      legend.set_in_layout(False)
      effective.plot(steps, summary[mode]["effective"], color="black")
      effective.set(
          title="tokens per node",
          xlabel="step",
          xlim=(0, steps[-1]),
          ylim=(0, None),
      )
  return figure


STUDY = study_lib.Study(
    title="Figure 3: lower MLP weights along training",
    config=Figure3Config(),
    measure=study_lib.streamed("figure3", measure),
    draw=draw,
    caption=(
        "Lower layer V = U_Cᵀ W of the first run, |v_lk| at the start and the"
        " end; the first four components of node v_0; and on how many tokens a"
        " node is, (Σ_l v_l²)² / Σ_l v_l⁴, mean over nodes and seeds."
    ),
)
