"""How does noise in the tree change what hidden nodes find?

JoMA's Table 1 (https://arxiv.org/abs/2310.00535) correlates hidden nodes with
latents of a hierarchy that has no noise: one sequence per class. Here is the
binary latent tree of Section 5 itself (`data.Hblt`), in which each node keeps
its parent's value with probability (1 + rho) / 2, at several rho. Two softmax
blocks below a linear read-out learn the root from fresh samples, as in
`two_layer_hblt`.

A score is the correlation of a latent with the best hidden node of a layer, a
mean over the latents of a depth, on held-out samples. Beside it stand the
untrained nodes and nodes trained on shuffled labels: the best of many random
nodes follows any latent that moves many tokens at once.

The figure shows scores against rho, a panel for each layer and depth, with both
floors, and accuracy. Means and 95 % intervals over seeds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import errors

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.block import data
  from joma.block import ensemble
  from joma.block import run as block_run
  from joma.block import tree_runs
  from joma.studies import drawing
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

LABELS = ("true", "shuffled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyHbltConfig:
  """How does noise in the tree change what hidden nodes find?

  Attributes:
    num_seeds: Runs of each setting.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_classes: Number of classes D of the root.
    num_roots: Nodes right under the root, even.
    branching: Children of a node, for each depth but the last.
    polarities: rho of every edge, each in (0, 1]; two or more.
    hidden_dim: Hidden nodes of either layer.
    batch_size: Samples of a step.
    num_held_out: Samples that scores are measured on.
    step_size: Learning rate of Adam.
    num_steps: Number of training steps.
    num_records: Measurements after the first one.
  """

  num_seeds: int = 5
  first_seed: int = 0
  num_classes: int = 8
  num_roots: int = 6
  branching: tuple[int, ...] = (3, 3)
  polarities: tuple[float, ...] = (0.4, 0.6, 0.8, 0.9, 1.0)
  hidden_dim: int = 32
  batch_size: int = 128
  num_held_out: int = 2048
  step_size: float = 0.01
  num_steps: int = 400
  num_records: int = 4

  def __post_init__(self):
    settings_lib.check_runs(self)
    settings_lib.check_tree(self)
    settings_lib.require_several("polarities", self.polarities)
    if max(self.polarities) > 1:
      raise errors.UserError(
          f"polarities must lie in (0, 1], got {self.polarities}."
      )


def measure(
    config: NoisyHbltConfig,
    *,
    on_metrics: study_lib.OnMetrics | None = None,
) -> dict[str, Any]:
  """Trains at every polarity on true and on shuffled labels.

  Args:
    config: Tree, sizes and rates.
    on_metrics: Takes mean accuracies, a row each record.

  Returns:
    "rows": for each polarity (a string) the intervals of "trained",
    "untrained" and "shuffled" scores [layers, depths], of the "gain" of trained
    over untrained and over shuffled nodes ("gain_shuffled"), run by run, and of
    "accuracy". "polarities", "steps", "finding".
  """
  seeds = settings_lib.seeds(config)
  runs = tree_runs.train(
      {
          f"{polarity:g}/{labels}": [
              _member(config, polarity, labels, seed) for seed in seeds
          ]
          for polarity in config.polarities
          for labels in LABELS
      },
      seeds,
      **settings_lib.sizes_of_trees(config),
      num_scores=1,
  )
  rows = {
      f"{polarity:g}": _summarize(runs, f"{polarity:g}")
      for polarity in config.polarities
  }
  accuracies = {name: runs[name].accuracy.mean(axis=0) for name in runs.names}
  study_lib.emit(on_metrics, runs.steps, accuracies)
  return {
      "steps": runs.steps,
      "polarities": list(config.polarities),
      "num_seeds": config.num_seeds,
      "num_classes": config.num_classes,
      "rows": rows,
      "finding": _finding(rows),
  }


def _member(
    config: NoisyHbltConfig, polarity: float, labels: str, seed: int
) -> block_run.BlockRun:
  """A run on its seed's tree, which is the same for either kind of labels."""
  tree = data.binary_tree(
      seed,
      num_classes=config.num_classes,
      num_roots=config.num_roots,
      branching=config.branching,
      polarity=polarity,
  )
  return tree_runs.member(
      tree, config.step_size, is_shuffled=labels == "shuffled"
  )


def _summarize(runs: ensemble.BlockRuns, polarity: str) -> dict[str, Any]:
  true, shuffled = (
      runs.score_of(f"{polarity}/{labels}").latents for labels in LABELS
  )
  accuracy = runs[f"{polarity}/true"].accuracy
  # Index 0 of the scores is the start. Gains are taken run by run, as the
  # trees of different seeds are not equally hard.
  return {
      "trained": intervals.interval(true[:, 1], most=1),
      "untrained": intervals.interval(true[:, 0], most=1),
      "shuffled": intervals.interval(shuffled[:, 1], most=1),
      "gain": intervals.interval(true[:, 1] - true[:, 0]),
      "gain_shuffled": intervals.interval(true[:, 1] - shuffled[:, 1]),
      "accuracy": intervals.interval(accuracy[:, -1], most=1),
  }


def _finding(rows: dict[str, dict[str, Any]]) -> str:
  def at(name: str, curve: str, layer: int, depth: int) -> str:
    parts = rows[name][curve]
    one = {key: value[layer, depth] for key, value in parts.items()}
    return intervals.text(one, 2)

  order = sorted(rows, key=float)
  clear = [name for name in order if rows[name]["gain"]["low"][1].min() > 0]
  largest = max(order, key=lambda name: rows[name]["gain"]["mean"][1, 0])
  verdict = (
      f"At rho {', '.join(clear)} training brings layer 2 closer to the latents"
      " of every depth than untrained nodes are"
      if clear
      else (
          "At no rho are trained nodes of layer 2 clearly closer to the latents"
          " of every depth than untrained ones"
      )
  )
  ends = (order[0], order[-1])
  clauses = "; ".join(
      f"rho {name}: {at(name, 'trained', 1, 0)}, untrained"
      f" {at(name, 'untrained', 1, 0)}, shuffled"
      f" {at(name, 'shuffled', 1, 0)}"
      for name in ends
  )
  return (
      f"{verdict}; at rho {order[-1]} it changes their score by"
      f" {at(order[-1], 'gain', 1, 0)}; scores of layer 2 on depth 0 are"
      f" ({clauses}), and the gain is largest at rho {largest},"
      f" {at(largest, 'gain', 1, 0)}."
  )


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the figure of a summary."""
  rows, polarities = summary["rows"], np.asarray(summary["polarities"])
  order = [f"{polarity:g}" for polarity in polarities]
  shape = np.shape(rows[order[0]]["trained"]["mean"])
  places = [
      (layer, depth) for layer in range(shape[0]) for depth in range(shape[1])
  ]
  looks = drawing.looks_of(["trained", "untrained", "shuffled"])
  with figures.style():
    figure, panels = figures.make_panels(len(places) + 1, "correlation")
    for axes, (layer, depth) in zip(panels, places, strict=False):
      for name, look in looks.items():
        values = np.array([
            [np.asarray(rows[key][name][part])[layer, depth] for key in order]
            for part in ("mean", "low", "high")
        ])
        label = "shuffled labels" if name == "shuffled" else name
        drawing.draw_points(axes, polarities, values, look, label)
      axes.set(
          title=f"layer {layer + 1}, depth {depth}",
          xlabel="polarity ρ",
          ylim=(0, 1.02),
      )
    accuracy = drawing.points([rows[key]["accuracy"] for key in order])
    look = drawing.looks_of(["trained"])["trained"]
    drawing.draw_points(panels[-1], polarities, accuracy, look, "")
    chance = 1 / summary["num_classes"]
    panels[-1].axhline(chance, color="black", linestyle=":")
    panels[-1].set(title="held-out accuracy", xlabel="polarity ρ")
    figures.put_legend_above(figure, figures.legend_entries(panels[0]))
  return figure


STUDY = study_lib.Study(
    title="Open question: latent trees with noise",
    config=NoisyHbltConfig(),
    measure=study_lib.streamed("noisy_hblt", measure),
    draw=draw,
    caption=(
        "Correlation of the best hidden node with the latents of a tree against"
        " the polarity ρ of its edges, for trained and untrained nodes and for"
        " nodes trained on shuffled labels, on held-out samples; and held-out"
        f" accuracy. {study_lib.BANDS}"
    ),
)
