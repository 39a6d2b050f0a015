"""Does attention entropy fall, then rise, below a nonlinear MLP?

JoMA (https://arxiv.org/abs/2310.00535) says so of exp attention: near a
critical point dv/dt = (mu - v) o e^{v^2 / 2}, so that salient tokens take all
attention first and the others catch up. Assumed are data that are an isotropic
mixture, a frozen upper layer, and a backpropagated gradient that is stationary.
Here one block trains below a frozen random read-out:

  isotropic, exp     x ~ N(P(.|n), noise^2 I), exp attention; all assumptions
                     but the last, as the gradient of the cross-entropy fades
  stationary         the same under the loss whose gradient never changes
  isotropic, frozen  the same with z = 0 throughout: the entropy is that of
                     softmax(sum_k v_k^2 / 2), which attention would follow
  sequences, exp     x: frequencies of T tokens drawn from P(.|n)
  sequences, softmax

P(.|n) has distinct tokens of falling salience (`block_data.class_probs`). A run
bounces if the entropy rises by `min_rise` above its least value so far, which
is below its start by as much.

The figure shows the entropy along training, mean and 95 % interval over seeds,
and every run's rise. Letters as in `joma.studies`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
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
  from joma.theory import invariants
  from joma.theory import metrics
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

ACTIVATIONS = ("relu", "gelu", "quadratic", "identity")
NONLINEAR = ACTIVATIONS[:3]
PANELS = (
    "isotropic, exp",
    "stationary",
    "isotropic, frozen",
    "sequences, exp",
    "sequences, softmax",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BounceConfig:
  """Does attention entropy fall, then rise, below a nonlinear MLP?

  Attributes:
    num_seeds: Runs of each setting.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_classes: Number of classes K.
    num_distinct: Distinct tokens of each class; no others.
    hidden_dim: Hidden nodes.
    num_samples: Samples of the data set, as many of each class.
    noise: Standard deviation of each coordinate of the isotropic mixture.
    seq_len: Tokens of a sequence, for the data that are frequencies.
    step_size: Learning rate of W and z under the cross-entropy.
    stationary_step_size: Learning rate of W and z under the stationary loss,
      which bursts.
    max_attn_logit: Attention logit at which a run stops.
    num_steps: Number of training steps.
    num_records: Measurements after the first one.
    min_rise: Rise of the entropy, in nats, that counts as a bounce.
  """

  num_seeds: int = 5
  first_seed: int = 0
  num_classes: int = 4
  num_distinct: int = 6
  hidden_dim: int = 16
  num_samples: int = 768
  noise: float = 0.1
  seq_len: int = 32
  step_size: float = 0.75
  stationary_step_size: float = 0.075
  max_attn_logit: float = 5.0
  num_steps: int = 1000
  num_records: int = 100
  min_rise: float = 0.01

  def __post_init__(self):
    settings_lib.check_runs(self)
    for name in ("num_classes", "num_distinct", "hidden_dim", "seq_len"):
      require.at_least(name, getattr(self, name), 1)
    require.at_least("num_samples", self.num_samples, self.num_classes)
    for name in (
        "noise",
        "step_size",
        "stationary_step_size",
        "max_attn_logit",
        "min_rise",
    ):
      require.positive(name, getattr(self, name))


def measure(
    config: BounceConfig,
    *,
    on_metrics: study_lib.OnMetrics | None = None,
) -> dict[str, Any]:
  """Trains every setting and measures how far the entropy rises.

  Args:
    config: Sizes and rates.
    on_metrics: Takes mean entropies, a row each record.

  Returns:
    "panels": for each of `PANELS` and each activation what `summarize` returns;
    "steps", "min_rise" and "finding".
  """
  panels: dict[str, dict[str, Any]] = {}
  for attention, draw, settings in _experiments(config):
    setting = make_setting(config, attention, draw)
    runs = train(config, setting, settings, NONLINEAR)
    for panel in settings:
      panels[panel] = {
          activation: summarize(
              runs[f"{panel}/{activation}"],
              attention,
              min_rise=config.min_rise,
              is_frozen="frozen" in panel,
          )
          for activation in NONLINEAR
      }
  every = config.num_steps // config.num_records
  steps = every * np.arange(config.num_records + 1)
  study_lib.emit(
      on_metrics,
      steps,
      {
          f"{panel}/{activation}": row["entropy"]["mean"]
          for panel, rows in panels.items()
          for activation, row in rows.items()
      },
  )
  return {
      "steps": steps,
      "min_rise": config.min_rise,
      "num_seeds": config.num_seeds,
      "panels": panels,
      "finding": _finding(panels, config.num_seeds),
  }


def _experiments(
    config: BounceConfig,
) -> list[
    tuple[dynamics.Attention, block_run.DrawBatch, dict[str, dict[str, Any]]]
]:
  """Lists attention, data, and by panel the arguments of `ensemble.member`."""
  clouds = data.DrawClouds(config.num_samples)
  sequences = data.DrawSequences(config.num_samples, config.seq_len)
  probs = class_probs(config)
  mixture = data.Clouds(probs, np.float32(config.noise))
  step = dict(lr_w=config.step_size, lr_z=config.step_size)
  # Under a gradient that never fades a run bursts at the other's rate.
  slow = config.stationary_step_size
  isotropic = {
      "isotropic, exp": dict(source=mixture, **step),
      "stationary": dict(
          source=mixture, lr_w=slow, lr_z=slow, is_stationary=True
      ),
      "isotropic, frozen": dict(
          source=mixture, lr_w=config.step_size, lr_z=0.0
      ),
  }
  return [
      ("exp", clouds, isotropic),
      ("exp", sequences, {"sequences, exp": dict(source=probs, **step)}),
      (
          "softmax",
          sequences,
          {"sequences, softmax": dict(source=probs, **step)},
      ),
  ]


def class_probs(config: Any) -> jaxtyping.Float[np.ndarray, "K M"]:
  """P(l|n) of the configured classes."""
  return data.class_probs(
      num_classes=config.num_classes,
      num_distinct=config.num_distinct,
      num_common=0,
  )


def make_setting(
    config: Any, attention: dynamics.Attention, draw: block_run.DrawBatch
) -> block_run.BlockSetting:
  """One block from z = 0 below a frozen random read-out."""
  block = model.JomaBlock(
      num_tokens=config.num_classes * config.num_distinct,
      hidden_dim=config.hidden_dim,
      kind=dynamics.Block(attention=attention),
      w_scale=0.1,
      z_scale=0.0,
  )
  return block_run.BlockSetting(
      blocks=(block,),
      num_classes=config.num_classes,
      draw=draw,
      activations=ACTIVATIONS,
      max_attn_logit=config.max_attn_logit,
      readout_scale=1.0,
  )


def train(
    config: Any,
    setting: block_run.BlockSetting,
    settings: Mapping[str, Mapping[str, Any]],
    activations: tuple[str, ...],
) -> ensemble.BlockRuns:
  """Crosses settings, arguments of `block_ensemble.member`, and activations."""
  return ensemble.train(
      {
          f"{name}/{activation}": ensemble.member(
              activation=ACTIVATIONS.index(activation), **arguments
          )
          for name, arguments in settings.items()
          for activation in activations
      },
      settings_lib.seeds(config),
      setting=setting,
      num_steps=config.num_steps,
      num_records=config.num_records,
  )


def summarize(
    seen: observe.Observation,
    attention: dynamics.Attention,
    *,
    min_rise: float,
    is_frozen: bool = False,
) -> dict[str, Any]:
  """Sums up the runs of one setting.

  Args:
    seen: Records [R, S, ...].
    attention: Kind of attention.
    min_rise: Nats that count as a bounce.
    is_frozen: Take the entropy that attention would have.

  Returns:
    The intervals of the entropy along training, of its `fall` before its
    largest `rise`, and of the `accuracy` in the end; `num_bounces` among the
    seeds, and `law_error`, the largest relative error of Theorem 1 at the end,
    which says whether the steps were small enough: 0 for frozen attention.
  """
  block = seen.blocks[0]
  entropy = block.implied_entropy if is_frozen else block.entropy
  # No entropy of M tokens exceeds ln M; intervals end there.
  most = np.log(block.v.shape[2])
  rises = [metrics.largest_rise(curve) for curve in entropy]
  return {
      "entropy": intervals.interval(entropy, least=0, most=most),
      "fall": intervals.interval(np.array([r.fall for r in rises]), least=0),
      "rise": intervals.interval(np.array([r.rise for r in rises]), least=0),
      "rises": [r.rise for r in rises],
      "num_bounces": sum(min(r.fall, r.rise) >= min_rise for r in rises),
      "accuracy": intervals.interval(seen.accuracy[:, -1], most=1),
      "law_error": 0.0 if is_frozen else _law_error(block, attention),
  }


def _law_error(
    block: observe.BlockObservation, attention: dynamics.Attention
) -> float:
  def error(
      z: jaxtyping.Float[jax.Array, "S Q M"],
      v: jaxtyping.Float[jax.Array, "S M F"],
      correction: jaxtyping.Float[jax.Array, "S M"],
  ) -> jaxtyping.Float[jax.Array, ""]:
    exact = dict(correction=correction) if attention == "softmax" else {}
    check = invariants.check_invariant(z, v, attention=attention, **exact)
    return check.relative_error[-1]

  # The law is one of changes since the start: two records do.
  ends = lambda leaf: leaf[:, np.array([0, -1])]
  arguments = map(ends, (block.attn_logits, block.v, block.correction))
  return float(np.max(jax.jit(jax.vmap(error))(*arguments)))


def _finding(panels: Mapping[str, Any], num_seeds: int) -> str:
  def count(panel: str) -> str:
    rows = panels[panel].values()
    return f"{sum(r['num_bounces'] for r in rows)} of {num_seeds * len(rows)}"

  exp = panels["isotropic, exp"]
  largest = max(exp, key=lambda name: exp[name]["rise"]["mean"])
  bounces = sum(row["num_bounces"] for row in exp.values())
  verdict = (
      "bounces" if 2 * bounces > num_seeds * len(exp) else "seldom bounces"
  )
  return (
      f"Attention entropy {verdict} under exp attention, a nonlinear MLP and"
      f" the cross-entropy on an isotropic mixture ({count('isotropic, exp')}"
      f" runs; largest for {largest}, by {intervals.text(exp[largest]['rise'])}"
      " nats); under the stationary gradient that the theory assumes"
      f" {count('stationary')} runs do, with frozen attention"
      f" {count('isotropic, frozen')} (of the entropy it would have), on token"
      f" sequences {count('sequences, exp')} with exp and"
      f" {count('sequences, softmax')} with softmax attention."
  )


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the figure of a summary."""
  panels, steps = summary["panels"], np.asarray(summary["steps"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 4.4)
    *axes_of, last = figure.subplots(2, 3).ravel().tolist()
    names = [*next(iter(panels.values()))]
    looks = drawing.looks_of(names)
    for axes, (panel, rows) in zip(axes_of, panels.items(), strict=True):
      for name in names:
        drawing.draw_interval(
            axes, steps, rows[name]["entropy"], looks[name], name
        )
      axes.set(title=panel, xlabel="step", ylabel="entropy (nats)")
    for place, rows in enumerate(panels.values()):
      for shift, name in zip(drawing.shifts(len(names)), names, strict=True):
        rises = np.maximum(rows[name]["rises"], 1e-4)
        x = np.full(len(rises), place + shift)
        look = looks[name]
        last.plot(x, rises, look.marker, color=look.color, alpha=0.8)
    last.axhline(summary["min_rise"], color="black", linestyle=":")
    last.set(
        title="rise after a fall, each run",
        ylabel="nats, at least 1e-4",
        yscale="log",
        xticks=range(len(panels)),
    )
    labels = [name.replace(", ", ",\n") for name in panels]
    last.set_xticklabels(labels, rotation=60, ha="right", fontsize=7)
    figures.put_legend_above(figure, figures.legend_entries(axes_of[0]))
  return figure


STUDY = study_lib.Study(
    title="Open question: does attention entropy bounce in training?",
    config=BounceConfig(),
    measure=study_lib.streamed("bounce", measure),
    draw=draw,
    caption=(
        "Entropy of attention along training, below a nonlinear MLP and a"
        " frozen read-out; with frozen attention, the entropy that attention"
        " would have by Theorem 1. Last panel: largest rise of each run after"
        f" a fall; dotted: what counts as a bounce. {study_lib.BANDS}"
    ),
)
