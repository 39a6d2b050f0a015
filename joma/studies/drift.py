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

Letters: R seeds, S records, M tokens.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from joma import question_config as config_lib
from joma.block import data
from joma.block import ensemble
from joma.block import model
from joma.block import train
from joma.studies import joint_invariant
from joma.theory import dynamics
from scansnap_jax.experiment import intervals

ACTIVATIONS = ("identity", "relu")
MODES = ("random", "gaussian")


def measure(
    config: config_lib.DriftConfig,
    *,
    on_metrics: intervals.OnMetrics | None = None,
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
  intervals.emit(
      on_metrics,
      runs.steps,
      {
          f"{name}/{curve}": row[curve]["mean"][None]
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


def _train(config: config_lib.DriftConfig) -> ensemble.Runs:
  block = model.JomaBlock(
      num_tokens=20,
      hidden_dim=config.hidden_dim,
      kind=dynamics.Block(attention="softmax"),
      w_scale=0.1,
  )
  setting = train.Setting(
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
      range(config.first_seed, config.first_seed + config.num_seeds),
      setting=setting,
      num_steps=config.num_steps,
      num_records=config.num_records,
  )


def relative_drift(
    attended: Float[Any, "R S M"],
) -> Float[np.ndarray, "R S"]:
  """Computes |b-bar(t) - b-bar(0)| / |b-bar(0)|."""
  start = attended[:, :1]
  change = np.linalg.norm(attended - start, axis=-1)
  return change / np.linalg.norm(start, axis=-1)


def _summarize(block: train.BlockObservation) -> dict[str, Any]:
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


def rank_correlation(a: Float[Any, "S"], b: Float[Any, "S"]) -> float:
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
