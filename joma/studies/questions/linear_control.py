"""Does attention entropy bounce below a linear MLP as well, and what makes it?

JoMA (https://arxiv.org/abs/2310.00535) has attention below linear MLPs only
grow sparser: with a stationary gradient Delta, exp attention and K = 1,
dv/dt = Delta o e^{v^2 / 2} (Theorem 2), which bursts in favour of one token.
The control trains the block of `bounce` with phi = identity, under two losses:

  stationary      Delta never changes, the theorem's case
  cross-entropy   Delta fades as samples are fitted

on isotropic mixtures x ~ N(P(.|n), noise^2 I). The more the classes overlap,
the nearer is the best fit of the cross-entropy. ReLU stands beside under it;
under the stationary loss it does in `bounce`.

The figure shows the entropy below a linear MLP along training for each loss
and noise, and the rise after its fall against noise, for both activations:
means and 95 % intervals over seeds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from joma.studies.questions import bounce
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.block import data
  from joma.studies import drawing
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

LOSSES = ("cross-entropy", "stationary")
# Loss and activation.
CASES = (
    ("cross-entropy", "identity"),
    ("cross-entropy", "relu"),
    ("stationary", "identity"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearControlConfig:
  """Does a linear MLP bounce as well, and what makes it?

  Attributes:
    num_seeds: Runs of each setting.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_classes: Number of classes K.
    num_distinct: Distinct tokens of each class; no others.
    hidden_dim: Hidden nodes.
    num_samples: Samples of the data set, as many of each class.
    noises: Standard deviations of the isotropic mixture; two or more.
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
  noises: tuple[float, ...] = (0.03, 0.06, 0.1, 0.15, 0.25)
  step_size: float = 0.75
  stationary_step_size: float = 0.075
  max_attn_logit: float = 5.0
  num_steps: int = 1000
  num_records: int = 100
  min_rise: float = 0.01

  def __post_init__(self):
    settings_lib.check_runs(self)
    for name in ("num_classes", "num_distinct", "hidden_dim"):
      require.at_least(name, getattr(self, name), 1)
    require.at_least("num_samples", self.num_samples, self.num_classes)
    settings_lib.require_several("noises", self.noises)
    for name in (
        "step_size",
        "stationary_step_size",
        "max_attn_logit",
        "min_rise",
    ):
      require.positive(name, getattr(self, name))


def measure(
    config: LinearControlConfig,
    *,
    on_metrics: study_lib.OnMetrics | None = None,
) -> dict[str, Any]:
  """Trains both losses, and ReLU under the cross-entropy, at every noise.

  Args:
    config: Sizes and rates.
    on_metrics: Takes mean entropies, a row each record.

  Returns:
    "rows": for each loss, activation and noise (a string) what
    `bounce.summarize` returns; "steps", "noises", "min_rise" and "finding".
  """
  draw = data.DrawClouds(config.num_samples)
  setting = bounce.make_setting(config, "exp", draw)
  every = config.num_steps // config.num_records
  steps = every * np.arange(config.num_records + 1)
  rows: dict[str, dict[str, dict[str, Any]]] = {loss: {} for loss in LOSSES}
  for loss, activation in CASES:
    runs = bounce.train(config, setting, _members(config, loss), (activation,))
    rows[loss][activation] = {
        f"{noise:g}": bounce.summarize(
            runs[f"{loss}/{noise:g}/{activation}"],
            "exp",
            min_rise=config.min_rise,
        )
        for noise in config.noises
    }
    entropies = {
        name: runs[name].blocks[0].entropy.mean(axis=0) for name in runs.names
    }
    study_lib.emit(on_metrics, steps, entropies)
  return {
      "steps": steps,
      "noises": list(config.noises),
      "min_rise": config.min_rise,
      "num_seeds": config.num_seeds,
      "rows": rows,
      "finding": _finding(rows, config.num_seeds),
  }


def _members(
    config: LinearControlConfig, loss: str
) -> dict[str, dict[str, Any]]:
  """Arguments of `ensemble.member` at every noise, for one of the losses."""
  is_stationary = loss == "stationary"
  # The gradient that never fades makes runs burst at the other's rate.
  rate = config.stationary_step_size if is_stationary else config.step_size
  probs = bounce.class_probs(config)
  return {
      f"{loss}/{noise:g}": dict(
          source=data.Clouds(probs, np.float32(noise)),
          lr_w=rate,
          lr_z=rate,
          is_stationary=is_stationary,
      )
      for noise in config.noises
  }


def _finding(rows: dict[str, Any], num_seeds: int) -> str:
  def count(loss: str, activation: str) -> int:
    return sum(r["num_bounces"] for r in rows[loss][activation].values())

  linear = rows["cross-entropy"]["identity"]
  total = num_seeds * len(linear)
  stationary = count("stationary", "identity")
  fading = count("cross-entropy", "identity")
  noise = max(linear, key=lambda name: linear[name]["rise"]["mean"])
  least = min(linear, key=float)
  verdict = (
      "A linear MLP bounces as well once its gradient may fade, so a bounce is"
      " no sign of nonlinearity"
      if fading > stationary
      else "A linear MLP does not bounce more with a fading gradient"
  )
  return (
      f"{verdict}: under the stationary gradient of Theorem 2 {stationary} of"
      f" {total} linear runs bounce, under the cross-entropy {fading} of"
      f" {total} (ReLU: {count('cross-entropy', 'relu')}), by up to"
      f" {intervals.text(linear[noise]['rise'])} nats at noise {noise} against"
      f" {intervals.text(linear[least]['rise'])} at noise {least}, where"
      " classes hardly overlap."
  )


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the figure of a summary."""
  rows, steps = summary["rows"], np.asarray(summary["steps"])
  noises = [f"{noise:g}" for noise in summary["noises"]]
  looks = drawing.looks_of(noises)
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.7)
    *curves, last = figure.subplots(1, 3)
    for axes, loss in zip(curves, ("stationary", "cross-entropy"), strict=True):
      for noise in noises:
        entropy = rows[loss]["identity"][noise]["entropy"]
        label = f"noise {noise}"
        drawing.draw_interval(axes, steps, entropy, looks[noise], label)
      axes.set(title=f"linear, {loss}", xlabel="step", ylabel="entropy (nats)")
    lines = [
        (f"{name}, {loss}", rows[loss][activation])
        for loss, activation, name in (
            ("cross-entropy", "identity", "linear"),
            ("cross-entropy", "relu", "ReLU"),
            ("stationary", "identity", "linear"),
        )
    ]
    shapes = drawing.looks_of([label for label, _ in lines])
    for label, row in lines:
      values = drawing.points([row[noise]["rise"] for noise in noises])
      drawing.draw_points(last, summary["noises"], values, shapes[label], label)
    last.axhline(summary["min_rise"], color="black", linestyle=":")
    last.set(
        title="rise after a fall",
        xlabel="noise (standard deviation)",
        ylabel="nats",
        ylim=(0, None),
    )
    last.legend()
    figures.put_legend_above(figure, figures.legend_entries(curves[0]))
  return figure


STUDY = study_lib.Study(
    title="Open question: the control with a linear activation",
    config=LinearControlConfig(),
    measure=study_lib.streamed("linear_control", measure),
    draw=draw,
    caption=(
        "Entropy of attention below a linear MLP along training, under a"
        " stationary gradient (Theorem 2) and under the cross-entropy, for"
        " isotropic mixtures of several noises; and the largest rise after a"
        " fall against noise. Dotted: what counts as a bounce."
        f" {study_lib.BANDS}"
    ),
)
