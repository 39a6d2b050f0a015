"""Figure 2 of JoMA: does attention follow the MLP as Theorem 1 says?

Normalized correlation of z(t) with what Theorem 1 makes of the lower MLP layer,
sum_k (v_k^2 - |w_k|^2 x-bar) / (2 T), and with either of its two terms alone
(https://arxiv.org/abs/2310.00535). Beside it stand slope and relative error, to
which correlation is blind, and the exact law.

20 classes, each one fixed context over 20 tokens, one query, width 30, softmax
attention at T = 1/2, phi = identity with the hidden nodes as outputs: logits
f^T W, cross-entropy over the classes. W and z start at N(0, 1) / 100 and train
by 2000 full-batch steps at rate 0.1. Two modes of contexts
(`data.class_contexts`): a bump that moves with the class, and random.

Paper's settings: 20 classes, 20 tokens, width 30, softmax attention at a
temperature of 1/2, 2,000 full-batch steps at rate .1 (the authors' code).

Letters as in `joma.studies`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import drawing
  from joma.theory import context_runs
  from scansnap_jax.experiment import figures


_CURVES = (
    "correlation",
    "first_term",
    "second_term",
    "change_correlation",
    "slope",
    "relative_error",
    "exact_relative_error",
    "drift",
    "loss",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure2Config:
  """Theorem 1 along training (Figure 2): class-conditional contexts.

  Attributes:
    num_seeds: Runs of either mode; each draws contexts and initial values.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Full-batch steps.
    record_every: Steps between measurements; divides num_steps.
    step_size: Learning rate of W and z.
    temperature: T of softmax attention.
  """

  num_seeds: int = 10
  first_seed: int = 0
  num_steps: int = 2000
  record_every: int = 20
  step_size: float = 0.1
  temperature: float = 0.5

  def __post_init__(self):
    settings_lib.require_seeds(self.first_seed, self.num_seeds)
    require.between("num_steps", self.num_steps, 1, 10**6)
    require.between("record_every", self.record_every, 1, self.num_steps)
    if self.num_steps % self.record_every:
      raise errors.UserError(
          f"record_every must divide num_steps={self.num_steps}, got"
          f" {self.record_every}."
      )
    require.positive("step_size", self.step_size)
    require.positive("temperature", self.temperature)


def run_all(config: Figure2Config) -> dict[str, context_runs.ContextRun]:
  """Trains every seed in both modes; leaves have a leading axis R."""
  seeds = config.first_seed + np.arange(config.num_seeds)
  keys = jax.vmap(jax.random.key)(seeds)
  starts = [
      jax.vmap(functools.partial(context_runs.draw_start, mode=mode))(keys)
      for mode in context_runs.MODES
  ]
  runs = context_runs.train(
      jax.tree.map(lambda *parts: jnp.concatenate(parts), *starts),
      temperature=config.temperature,
      step_size=config.step_size,
      num_records=config.num_steps // config.record_every,
      steps_per_record=config.record_every,
  )
  # Both modes trained as one batch, and are taken apart again.
  halves = jax.tree.map(lambda x: np.split(x, 2), jax.device_get(runs))
  is_half = lambda x: isinstance(x, list)
  return {
      mode: jax.tree.map(lambda x, i=i: x[i], halves, is_leaf=is_half)
      for i, mode in enumerate(context_runs.MODES)
  }


def steps(config: Figure2Config) -> np.ndarray:
  """The steps at which runs are measured, 0 and the last included."""
  return np.arange(0, config.num_steps + 1, config.record_every)


def measure(
    config: Figure2Config,
    *,
    on_metrics: study_lib.OnMetrics | None = None,
) -> dict[str, Any]:
  """Trains all runs and holds Theorem 1 against them.

  Args:
    config: The settings.
    on_metrics: Called with the step and a row of means over seeds.

  Returns:
    `steps`; for each mode and curve (`context_runs.ContextRun`;
    change_correlation, slope and relative_error are those of the printed law,
    between changes since the start) the mean, smallest and
    largest over seeds [S] and, under `final`, the last value of each run [R];
    and the finding.
  """
  summary: dict[str, Any] = {
      "num_seeds": config.num_seeds,
      "steps": steps(config),
      **{mode: _summarize(runs) for mode, runs in run_all(config).items()},
  }
  names = itertools.product(context_runs.MODES, _CURVES)
  curves = {f"{m}_{name}": summary[m][name]["mean"] for m, name in names}
  study_lib.emit(on_metrics, summary["steps"], curves)
  return {**summary, "finding": _finding(summary)}


def _summarize(runs: context_runs.ContextRun) -> dict[str, Any]:
  curves = {
      "correlation": runs.correlation,
      "first_term": runs.first_term,
      "second_term": runs.second_term,
      "change_correlation": runs.printed.correlation,
      "slope": runs.printed.slope,
      "relative_error": runs.printed.relative_error,
      "exact_relative_error": runs.exact.relative_error,
      "drift": runs.drift,
      "loss": runs.loss,
  }
  bands = {
      name: {
          "mean": np.mean(curve, axis=0),
          "min": np.min(curve, axis=0),
          "max": np.max(curve, axis=0),
      }
      for name, curve in curves.items()
  }
  final = {name: curve[:, -1] for name, curve in curves.items()}
  return {**bands, "final": final}


def _finding(summary: dict[str, Any]) -> str:
  final = [summary[mode]["final"] for mode in context_runs.MODES]
  # The worst seed decides: a mean would hide a run in which the law fails.
  least = min(float(of_mode["correlation"].min()) for of_mode in final)
  error = [float(of_mode["relative_error"].mean()) for of_mode in final]
  slope = [float(of_mode["slope"].mean()) for of_mode in final]
  exact = max(float(of_mode["exact_relative_error"].max()) for of_mode in final)
  direction = "keeps" if least > 0.8 else "loses"
  scale = "keeps" if max(error) < 0.1 else "loses"
  law = "holds" if exact < 0.05 else "fails"
  return (
      f"At step {summary['steps'][-1]} the printed law {direction} the"
      f" direction (normalized correlation at least {least:.3f} over"
      f" {summary['num_seeds']} seeds and both modes) and {scale} the scale:"
      f" slope {slope[0]:.2f} and {slope[1]:.2f}, relative error {error[0]:.1f}"
      f" and {error[1]:.1f} (gaussian, random; mean); the exact law {law}, with"
      f" relative error up to {exact:.4f}."
  )


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws correlation above, slope and relative errors below, by mode."""
  looks = drawing.looks(4)
  rows = (
      (
          ("correlation", "both terms"),
          ("first_term", "first term alone"),
          ("second_term", "second term alone"),
      ),
      (
          ("change_correlation", "correlation of changes, printed law"),
          ("slope", "slope, printed law"),
          ("relative_error", "relative error, printed law"),
          ("exact_relative_error", "relative error, exact law"),
      ),
  )
  steps = np.asarray(summary["steps"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 4.7)
    parts = figure.subfigures(2, 1, squeeze=False)[:, 0]
    for part, curves in zip(parts, rows, strict=True):
      panels = part.subplots(1, 2, sharey=True)
      for axes, (mode, title) in zip(
          panels, drawing.MODE_TITLES.items(), strict=True
      ):
        for (name, label), look in zip(curves, looks, strict=False):
          # In the lower row nothing has changed yet at the first step.
          skip = 0 if curves is rows[0] else 1
          band = {n: c[skip:] for n, c in summary[mode][name].items()}
          drawing.draw_range(axes, steps[skip:], band, look, label)
        axes.set(xlabel="step", xlim=(0, steps[-1]), title=title)
      figures.put_legend_above(part, figures.legend_entries(*panels))
      if curves is rows[0]:
        panels[0].set(ylabel="normalized correlation", ylim=(-0.6, 1.05))
      else:
        panels[0].set(ylabel="of changes since step 0", yscale="log")
  return figure


STUDY = study_lib.Study(
    title="Figure 2: attention logits follow the MLP",
    config=Figure2Config(),
    measure=study_lib.streamed("figure2", measure),
    draw=draw,
    caption=(
        "Theorem 1 under softmax attention. Top: normalized correlation of z"
        " with z(0) plus the change of the figure's predictor (‖w_k‖² and the"
        " mean context), so 1 at the start, and with either of its terms alone."
        " Bottom, by the theorem's own predictor (‖v_k‖² and b̄ at the start)"
        " and for changes alone: correlation, slope and relative error of the"
        " printed law, and the relative error of the exact one. Lines: mean"
        " over seeds; bands: smallest to largest."
    ),
)
