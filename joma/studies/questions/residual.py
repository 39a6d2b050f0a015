"""What does the query's residual change?

In JoMA (https://arxiv.org/abs/2310.00535) the MLP sees f = U_C b + u_q; without
the residual, f = U_C b, and the query is felt through its attention z_q alone.
One ReLU block and its read-out train on class contexts under Q queries that
share the MLP, with and without the residual, on two tasks:

  silent      the label is the class n, whatever the query
  speaking    the label is (n + m) mod K under query m: no answer without it

Theorem 1 for several queries holds in the sum over queries (`invariants`); the
same law for each query alone, its share 1 / Q of the right side, does not.

The figure shows loss, attention entropy, and how far the queries' attention is
apart: mean total variation between b-bar of two queries, normalized, from 0 to
1; and the errors of the laws at the end. Means and 95 % intervals over seeds.

Letters as in `joma.studies`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  import jaxtyping
  from matplotlib import axes as mpl_axes
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.block import data
  from joma.block import ensemble
  from joma.block import model
  from joma.block import observe
  from joma.block import run as block_run
  from joma.studies import drawing
  from joma.theory import dynamics
  from joma.theory import invariants
  from joma.theory import metrics
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

ATTENTIONS: tuple[dynamics.Attention, ...] = ("exp", "softmax")
TASKS = ("silent", "speaking")
RESIDUALS = ("on", "off")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidualConfig:
  """What does the query's residual change?

  Attributes:
    num_seeds: Runs of each setting.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_classes: Number of classes K, each with one fixed context under every
      query.
    num_queries: Number of queries Q, two or more.
    hidden_dim: Hidden nodes.
    step_size: Learning rate of all that is trained.
    num_steps: Number of training steps.
    num_records: Measurements after the first one.
  """

  num_seeds: int = 5
  first_seed: int = 0
  num_classes: int = 10
  num_queries: int = 3
  hidden_dim: int = 32
  step_size: float = 0.2
  num_steps: int = 2400
  num_records: int = 40

  def __post_init__(self):
    settings_lib.check_runs(self)
    for name in ("num_classes", "num_queries", "hidden_dim"):
      require.at_least(name, getattr(self, name), 2)
    require.positive("step_size", self.step_size)


def measure(
    config: ResidualConfig,
    *,
    on_metrics: study_lib.OnMetrics | None = None,
) -> dict[str, Any]:
  """Trains both tasks with either attention, with and without the residual.

  Args:
    config: Sizes and rates.
    on_metrics: Takes mean losses and entropies, a row each record.

  Returns:
    "rows": for each "attention/task/residual": intervals along training of
    "loss", "entropy" and "distance" between queries; at the end, of "accuracy",
    and of the relative errors of the "summed_law" and of the "single_law", the
    mean over queries. "costs": for each "attention/task", by how much the final
    loss is higher without the residual, seed by seed. "steps", "finding".
  """
  rows: dict[str, dict[str, Any]] = {}
  costs: dict[str, Any] = {}
  for attention in ATTENTIONS:
    on, off = (_train(config, attention, r == "on") for r in RESIDUALS)
    for task in TASKS:
      name = f"{attention}/{task}"
      for residual, runs in zip(RESIDUALS, (on, off), strict=True):
        rows[f"{name}/{residual}"] = _summarize(runs[task], attention)
      cost = off[task].loss[:, -1] - on[task].loss[:, -1]
      costs[name] = intervals.interval(cost)
  every = config.num_steps // config.num_records
  steps = every * np.arange(config.num_records + 1)
  study_lib.emit(
      on_metrics,
      steps,
      {
          f"{name}/{curve}": row[curve]["mean"]
          for name, row in rows.items()
          for curve in ("loss", "entropy", "distance")
      },
  )
  return {
      "steps": steps,
      "num_seeds": config.num_seeds,
      "rows": rows,
      "costs": costs,
      "finding": _finding(rows, costs),
  }


def _train(
    config: ResidualConfig,
    attention: dynamics.Attention,
    has_residual: bool,
) -> ensemble.BlockRuns:
  block = model.JomaBlock(
      num_tokens=20,
      hidden_dim=config.hidden_dim,
      num_queries=config.num_queries,
      kind=dynamics.Block(attention=attention, has_residual=has_residual),
      w_scale=0.1,
  )
  setting = block_run.BlockSetting(
      blocks=(block,),
      num_classes=config.num_classes,
      draw=data.DrawContexts(config.num_classes, config.num_queries),
      max_attn_logit=8.0,
      readout_scale=1.0,
  )
  members = {
      task: ensemble.member(
          source=data.ContextSource(
              np.bool_(False), np.int32(task == "speaking")
          ),
          lr_w=config.step_size,
          lr_z=config.step_size,
          lr_readout=config.step_size,
      )
      for task in TASKS
  }
  return ensemble.train(
      members,
      settings_lib.seeds(config),
      setting=setting,
      num_steps=config.num_steps,
      num_records=config.num_records,
  )


def query_distance(
    attn_logits: jaxtyping.Float[jax.Array, "S Q M"],
) -> jaxtyping.Float[jax.Array, "S"]:
  """Computes the mean total variation between softmax(z_q) of two queries."""
  probs = jax.nn.softmax(attn_logits, axis=-1)
  gaps = jnp.abs(probs[:, :, None] - probs[:, None]).sum(axis=-1) / 2
  # Over ordered pairs of different queries; a query is at distance 0 of itself.
  num_queries = attn_logits.shape[1]
  return gaps.sum(axis=(1, 2)) / (num_queries * (num_queries - 1))


def law_errors(
    attn_logits: jaxtyping.Float[jax.Array, "S Q M"],
    v: jaxtyping.Float[jax.Array, "S M F"],
    correction: jaxtyping.Float[jax.Array, "S M"],
    attention: dynamics.Attention,
) -> tuple[jaxtyping.Float[jax.Array, ""], jaxtyping.Float[jax.Array, ""]]:
  """Computes the last relative errors of Theorem 1, exact second term.

  Args:
    attn_logits: Z.
    v: U_C^T W.
    correction: The integrated second term, summed over queries.
    attention: exp or softmax.

  Returns:
    The error of the sum over queries, and the mean error of single queries,
    each predicted to move by 1 / Q of the sum.
  """
  exact = dict(correction=correction) if attention == "softmax" else {}
  kind = dict(attention=attention)
  predicted = invariants.predicted_change(v, **kind, **exact)[-1]
  summed = invariants.measured_change(attn_logits, **kind)[-1]
  single = attn_logits[-1] - attn_logits[0]
  # The law predicts the sum over queries; an equal share of it is all that it
  # could say of one.
  share = jnp.broadcast_to(predicted / len(single), single.shape)
  return (
      metrics.relative_error(summed, predicted),
      jax.vmap(metrics.relative_error)(single, share).mean(),
  )


def _summarize(
    seen: observe.Observation, attention: dynamics.Attention
) -> dict[str, Any]:
  block = seen.blocks[0]
  errors_of = functools.partial(law_errors, attention=attention)
  errors = jax.jit(jax.vmap(errors_of))(
      block.attn_logits, block.v, block.correction
  )
  distance = jax.jit(jax.vmap(query_distance))(block.attn_logits)
  interval = lambda values, most=np.inf: intervals.interval(
      values, least=0, most=most
  )
  return {
      "loss": interval(seen.loss),
      "entropy": interval(block.entropy),
      "distance": interval(distance),
      "accuracy": interval(seen.accuracy[:, -1], most=1),
      "summed_law": intervals.interval(errors[0], is_positive=True),
      "single_law": intervals.interval(errors[1], is_positive=True),
  }


def _finding(rows: dict[str, dict[str, Any]], costs: dict[str, Any]) -> str:
  def pair(name: str, curve: str) -> str:
    on, off = (rows[f"{name}/{residual}"][curve] for residual in RESIDUALS)
    last = lambda parts: {key: value[-1] for key, value in parts.items()}
    on, off = (
        last(parts) if np.ndim(parts["mean"]) else parts for parts in (on, off)
    )
    return f"{intervals.text(on, 2)} with, {intervals.text(off, 2)} without"

  cost, silent = costs["softmax/speaking"], costs["softmax/silent"]
  if cost["low"] > 0:
    verdict = "Without the residual a query that matters is learned more slowly"
  elif cost["high"] < 0:
    verdict = "The residual slows down what depends on the query"
  else:
    verdict = "The residual makes no clear difference to the loss"
  worst = max(row["summed_law"]["mean"] for row in rows.values())
  least = min(
      row["single_law"]["mean"] for name, row in rows.items() if "speak" in name
  )
  return (
      f"{verdict}: under softmax attention the final loss without it is higher"
      f" by {intervals.text(cost, 2)} nats where the query speaks and by"
      f" {intervals.text(silent, 2)} where it is silent (exp:"
      f" {intervals.text(costs['exp/speaking'], 2)} and"
      f" {intervals.text(costs['exp/silent'], 2)}); where it speaks, attention"
      f" entropy ends at {pair('softmax/speaking', 'entropy')}, and queries"
      f" attend apart by {pair('softmax/speaking', 'distance')}; the law summed"
      f" over queries is off by at most {worst:.4f} in all settings, a single"
      f" speaking query's by {least:.2f} or more."
  )


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the figure of a summary."""
  steps, rows = np.asarray(summary["steps"]), summary["rows"]
  attentions = list(dict.fromkeys(name.split("/")[0] for name in rows))
  looks = drawing.looks_of(["silent", "speaking"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 4.6)
    grid = figure.subplots(2, 4)
    for line, attention in zip(grid, attentions, strict=True):
      of_kind = {n: r for n, r in rows.items() if n.startswith(attention)}
      curves = ("loss", "entropy", "distance")
      for axes, curve in zip(line[:3], curves, strict=True):
        for name, row in of_kind.items():
          _, task, is_on = name.split("/")
          look = looks[task]._replace(linestyle=drawing.STYLES[is_on == "off"])
          label = f"{task}, residual {is_on}"
          drawing.draw_interval(axes, steps, row[curve], look, label)
        title = {"distance": "distance of queries"}.get(curve, curve)
        axes.set(title=f"{attention}, {title}", xlabel="step")
      _draw_laws(line[-1], of_kind)
      line[-1].set(title=f"{attention}, errors", yscale="log")
    figures.put_legend_above(figure, figures.legend_entries(grid[0, 0]))
  return figure


def _draw_laws(axes: mpl_axes.Axes, rows: Mapping[str, Any]) -> None:
  for curve, look, label in (
      ("summed_law", "ko", "summed"),
      ("single_law", "ws", "single"),
  ):
    values = drawing.points([row[curve] for row in rows.values()])
    axes.errorbar(
        *drawing.as_errors(range(len(rows)), values),
        fmt=look,
        markeredgecolor="black",
        ecolor="black",
        elinewidth=0.7,
        label=label,
    )
  axes.set_xticks(range(len(rows)))
  labels = [" ".join(name.split("/")[1:]) for name in rows]
  axes.set_xticklabels(labels, rotation=60, ha="right", fontsize=7)
  axes.legend()


STUDY = study_lib.Study(
    title="Open question: with and without the residual",
    config=ResidualConfig(),
    measure=study_lib.streamed("residual", measure),
    draw=draw,
    caption=(
        "Three queries or more with one MLP, with the query's residual (solid)"
        " and without (dashed), on labels that depend on the query (speaking)"
        " and that do not (silent). Distance: mean total variation between the"
        " attention of two queries. Last panel: relative error of Theorem 1 at"
        f" the end, summed over queries and for single ones. {study_lib.BANDS}"
    ),
)
