"""Does the drift of b-bar explain the error of the softmax invariant?

Theorem 1 of JoMA (https://arxiv.org/abs/2310.00535) for softmax attention takes
b-bar = E[b] as constant and E[gh b b^T] as b-bar E[gh b]^T. Along training on
class contexts (`data.class_contexts`), below a frozen read-out,

  drift       |b-bar(t) - b-bar(0)| / |b-bar(0)|
  fixed       relative error of the law with b-bar(0), as printed
  moving      the same with int b-bar d(sum_k |v_k|^2): drift is accounted for,
              the factorization is not
  exact       the same with the exact second term: neither is assumed

so that what `moving` mends is the drift's share of the error, and what it
leaves is the factorization's. The figure shows all four along training, and the
error against the drift, run by run. Means and 95 % intervals over seeds.

Letters as in `joma.studies`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from joma.studies.questions import joint_invariant
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax.numpy as jnp
  import jaxtyping
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.block import data
  from joma.block import ensemble
  from joma.block import model
  from joma.block import observe
  from joma.block import run as block_run
  from joma.studies import drawing
  from joma.theory import dynamics
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

ACTIVATIONS = ("identity", "relu")
MODES = ("random", "gaussian")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DriftConfig:
  """Does the drift of b-bar explain the error of the softmax invariant?

  Attributes:
    num_seeds: Runs of each setting.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_classes: Number of classes K, each with one fixed context.
    hidden_dim: Hidden nodes.
    step_size: Learning rate of W and z.
    num_steps: Number of training steps.
    num_records: Measurements after the first one.
  """

  num_seeds: int = 10
  first_seed: int = 0
  num_classes: int = 20
  hidden_dim: int = 32
  step_size: float = 0.5
  num_steps: int = 2000
  num_records: int = 100

  def __post_init__(self):
    settings_lib.check_runs(self)
    for name in ("num_classes", "hidden_dim"):
      require.at_least(name, getattr(self, name), 2)
    require.positive("step_size", self.step_size)


def measure(
    config: DriftConfig,
    *,
    on_metrics: study_lib.OnMetrics | None = None,
) -> dict[str, Any]:
  """Trains both activations on both kinds of contexts.

  Args:
    config: Sizes and rates.
    on_metrics: Takes mean drifts and errors, a row each record.

  Returns:
    "rows": for each "activation/mode": intervals along training of "drift",
    "fixed", "moving" and "exact"; "rank_correlation", of drift with the fixed
    law's error, over the records of each run; "share_mended" at the end, 1 -
    moving / fixed; every run's "drifts" and "errors" [R, S]. "steps",
    "finding".
  """
  runs = _train(config)
  rows = {name: _summarize(runs[name].blocks[0]) for name in runs.names}
  study_lib.emit(
      on_metrics,
      runs.steps,
      {
          f"{name}/{curve}": row[curve]["mean"]
          for name, row in rows.items()
          for curve in ("drift", "fixed", "moving", "exact")
      },
  )
  return {
      "steps": runs.steps,
      "num_seeds": config.num_seeds,
      "rows": rows,
      "finding": _finding(rows),
  }


def _train(config: DriftConfig) -> ensemble.BlockRuns:
  block = model.JomaBlock(
      num_tokens=20,
      hidden_dim=config.hidden_dim,
      kind=dynamics.Block(attention="softmax"),
      w_scale=0.1,
  )
  setting = block_run.BlockSetting(
      blocks=(block,),
      num_classes=config.num_classes,
      draw=data.DrawContexts(config.num_classes),
      activations=ACTIVATIONS,
      readout_scale=1.0,
  )
  members = {
      f"{activation}/{mode}": ensemble.member(
          source=data.ContextSource(np.bool_(mode == "gaussian")),
          lr_w=config.step_size,
          lr_z=config.step_size,
          activation=ACTIVATIONS.index(activation),
      )
      for activation in ACTIVATIONS
      for mode in MODES
  }
  return ensemble.train(
      members,
      settings_lib.seeds(config),
      setting=setting,
      num_steps=config.num_steps,
      num_records=config.num_records,
  )


def relative_drift(
    attended: jaxtyping.Float[Any, "R S M"],
) -> jaxtyping.Float[np.ndarray, "R S"]:
  """Computes |b-bar(t) - b-bar(0)| / |b-bar(0)|."""
  start = attended[:, :1]
  change = np.linalg.norm(attended - start, axis=-1)
  return change / np.linalg.norm(start, axis=-1)


def _summarize(block: observe.BlockObservation) -> dict[str, Any]:
  check = lambda **second: np.asarray(
      joint_invariant.printed_check(block, **second).relative_error
  )
  errors = {
      "fixed": check(),
      "moving": check(attended=jnp.asarray(block.attended)),
      "exact": check(correction=jnp.asarray(block.correction)),
  }
  drift = relative_drift(block.attended)
  mended = 1 - errors["moving"][:, -1] / errors["fixed"][:, -1]
  # Without the start, where both are 0, and by ranks, as neither is linear in
  # the other.
  ranked = [
      rank_correlation(d[1:], e[1:])
      for d, e in zip(drift, errors["fixed"], strict=True)
  ]
  return {
      "drift": intervals.interval(drift, is_positive=True),
      **{
          name: intervals.interval(error, is_positive=True)
          for name, error in errors.items()
      },
      "rank_correlation": intervals.interval(np.array(ranked), most=1),
      "share_mended": intervals.interval(mended, most=1),
      "drifts": drift,
      "errors": errors["fixed"],
  }


def rank_correlation(
    a: jaxtyping.Float[Any, "S"], b: jaxtyping.Float[Any, "S"]
) -> float:
  """Computes Spearman's correlation of values without ties."""
  rank_a, rank_b = (np.argsort(np.argsort(x)) for x in (a, b))
  return float(np.corrcoef(rank_a, rank_b)[0, 1])


def _finding(rows: dict[str, dict[str, Any]]) -> str:
  mended = [row["share_mended"] for row in rows.values()]
  lows = [part["low"] for part in mended]
  highs = [part["high"] for part in mended]
  if min(lows) > 0.5:
    verdict = "The drift of b-bar explains most of the printed law's error"
  elif max(highs) < 0.5:
    verdict = "The drift of b-bar explains less than half of the printed error"
  else:
    verdict = "The drift of b-bar explains a part of the error that varies"
  shares = "; ".join(
      f"{name} {intervals.text(row['share_mended'], 2)}"
      for name, row in rows.items()
  )
  last = lambda name: [row[name]["mean"][-1] for row in rows.values()]
  ranked = [row["rank_correlation"]["mean"] for row in rows.values()]
  return (
      f"{verdict}: at the end drift is {min(last('drift')):.2f} to"
      f" {max(last('drift')):.2f} and the error {min(last('fixed')):.2f} to"
      f" {max(last('fixed')):.2f}; within a run they rise together (rank"
      f" correlation {min(ranked):.2f} to {max(ranked):.2f}), and a b-bar that"
      f" moves mends the share {shares}; the exact second term leaves at most"
      f" {max(last('exact')):.3f}."
  )


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the figure of a summary."""
  steps, rows = np.asarray(summary["steps"])[1:], summary["rows"]
  curves = ("drift", "fixed", "moving", "exact")
  labels = ("drift of b̄", "error as printed", "b̄ moving", "exact second term")
  looks = drawing.looks_of(curves)
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 4.4)
    panels = figure.subplots(2, 3).ravel().tolist()
    for axes, (name, row) in zip(panels, rows.items(), strict=False):
      for curve, label in zip(curves, labels, strict=True):
        drawing.draw_interval(
            axes, steps, drawing.tail(row[curve]), looks[curve], label
        )
      axes.set(title=name.replace("/", ", "), xlabel="step", yscale="log")
      axes.set_ylim(1e-3, None)
    share, against = panels[len(rows)], panels[len(rows) + 1]
    values = drawing.points([row["share_mended"] for row in rows.values()])
    share.errorbar(
        *drawing.as_errors(range(len(rows)), values), fmt="ko", capsize=2
    )
    share.set(title="share mended by a moving b̄", ylim=(0, 1.05))
    share.set_xticks(range(len(rows)))
    share.set_xticklabels([*rows], rotation=30, ha="right", fontsize=7)
    for (name, row), look in zip(
        rows.items(), drawing.looks_of([*rows]).values(), strict=True
    ):
      for i, (x, y) in enumerate(
          zip(row["drifts"], row["errors"], strict=True)
      ):
        label = name.replace("/", ", ") if i == 0 else ""
        x, y = np.asarray(x)[1:], np.asarray(y)[1:]
        style = dict(color=look.color, linestyle=look.linestyle)
        against.plot(x, y, **style, linewidth=0.6, label=label)
    against.set(
        title="every run",
        xlabel="drift of b̄",
        ylabel="error as printed",
        xscale="log",
        yscale="log",
    )
    against.legend()
    figures.put_legend_above(figure, figures.legend_entries(panels[0]))
  return figure


STUDY = study_lib.Study(
    title="Open question: drift of mean attention",
    config=DriftConfig(),
    measure=study_lib.streamed("drift", measure),
    draw=draw,
    caption=(
        "Drift of b̄ and relative errors of the softmax invariant: as printed,"
        " with b̄ moving, and with the exact second term. Last panel: error as"
        f" printed against drift, one line a run. {study_lib.BANDS}"
    ),
)
