"""Do the layers of a stack find the latents of a tree from the bottom up?

JoMA (https://arxiv.org/abs/2310.00535, Section 5) argues that tokens under a
near common ancestor co-occur most and so are joined first, in low layers. Here
two softmax blocks below a linear read-out learn to tell the root of a binary
latent tree (`data.Hblt`) from its leaves, a fresh sample at each step, with
attention learned, or frozen at z = 0 (uniform over the tokens present). The
edge above every second leaf is weak, so that attention has something to learn.

Nodes right under the root have depth 0. A score is the correlation of a latent
with the hidden node that follows it best, a mean over the latents of a depth,
on held-out samples (`metrics.latent_scores`). Three floors stand beside it:

  untrained   the same nodes before the first step
  shuffled    nodes trained on labels that have nothing to do with the tokens
  chance      the trained nodes against latents of other samples

The figure shows scores of each layer and depth at the end, with these floors,
and along training. Means and 95 % intervals over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  from matplotlib import axes as mpl_axes
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.block import data as block_data
  from joma.block import ensemble
  from joma.block import run as block_run
  from joma.block import tree_runs
  from joma.studies import drawing
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

CASES = ("learned", "frozen", "shuffled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoLayerHbltConfig:
  """Do the layers of a stack find the latents of a tree from the bottom up?

  Attributes:
    num_seeds: Runs of each setting.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_classes: Number of classes D of the root.
    num_roots: Nodes right under the root, even.
    branching: Children of a node, for each depth but the last.
    polarity: rho of the edges, in (0, 1], but for every second leaf.
    weak_polarity: rho of the edge above every second leaf, in [0, 1], which
      gives attention something to learn.
    hidden_dim: Hidden nodes of either layer.
    batch_size: Samples of a step.
    num_held_out: Samples that scores are measured on.
    step_size: Learning rate of Adam.
    num_steps: Number of training steps.
    num_records: Measurements after the first one, a multiple of num_scores.
    num_scores: How often the nodes are held against the latents.
  """

  num_seeds: int = 5
  first_seed: int = 0
  num_classes: int = 8
  num_roots: int = 6
  branching: tuple[int, ...] = (3, 4)
  polarity: float = 0.9
  weak_polarity: float = 0.2
  hidden_dim: int = 32
  batch_size: int = 128
  num_held_out: int = 2048
  step_size: float = 0.01
  num_steps: int = 1000
  num_records: int = 20
  num_scores: int = 5

  def __post_init__(self):
    settings_lib.check_runs(self)
    settings_lib.check_tree(self)
    require.at_least("num_scores", self.num_scores, 1)
    if self.num_records % self.num_scores:
      raise errors.UserError(
          f"num_records must be a multiple of num_scores={self.num_scores},"
          f" got {self.num_records}."
      )
    if not 0 < self.polarity <= 1:
      raise errors.UserError(
          f"polarity must lie in (0, 1], got {self.polarity}."
      )
    if not 0 <= self.weak_polarity <= 1:
      raise errors.UserError(
          f"weak_polarity must lie in [0, 1], got {self.weak_polarity}."
      )


def measure(
    config: TwoLayerHbltConfig,
    *,
    on_metrics: study_lib.OnMetrics | None = None,
) -> dict[str, Any]:
  """Trains with learned and frozen attention, and on shuffled labels.

  Args:
    config: Tree, sizes and rates.
    on_metrics: Takes mean accuracies, losses and entropies, a row each record.

  Returns:
    "cases": for each of `CASES` the intervals along training of "accuracy",
    "loss", "entropy" and "stable_rank" [S, layers], and "strong_share" of the
    first layer's softmax(z) on leaves with a strong edge; "scores" and "chance"
    [times, layers, depths]; those scores' "gain" over the untrained ones, run
    by run; and "sorting", by how much more layer 2 gains on the top depth, over
    layer 1, than on the lowest. "score_steps", "steps", "finding".
  """
  seeds = settings_lib.seeds(config)
  runs = tree_runs.train(
      {case: [_member(config, case, seed) for seed in seeds] for case in CASES},
      seeds,
      **settings_lib.sizes_of_trees(config),
      num_scores=config.num_scores,
  )
  cases = {case: _summarize(runs, case) for case in CASES}
  study_lib.emit(
      on_metrics,
      runs.steps,
      {
          f"{case}/{name}": row[name]["mean"]
          for case, row in cases.items()
          for name in ("accuracy", "loss")
      },
  )
  times = np.linspace(0, config.num_steps, config.num_scores + 1)
  return {
      "steps": runs.steps,
      "score_steps": times,
      "num_seeds": config.num_seeds,
      "cases": cases,
      "finding": _finding(cases),
  }


def _member(
    config: TwoLayerHbltConfig, case: str, seed: int
) -> block_run.BlockRun:
  """A run on its seed's tree, which is the same in every case."""
  tree = block_data.binary_tree(
      seed,
      num_classes=config.num_classes,
      num_roots=config.num_roots,
      branching=config.branching,
      polarity=config.polarity,
      weak_polarity=config.weak_polarity,
  )
  return tree_runs.member(
      tree,
      config.step_size,
      is_frozen=case == "frozen",
      is_shuffled=case == "shuffled",
  )


def _summarize(runs: ensemble.BlockRuns, case: str) -> dict[str, Any]:
  seen, scores = runs[case], runs.score_of(case)
  stack = lambda name: np.stack(
      [getattr(block, name) for block in seen.blocks], axis=-1
  )
  gain = scores.latents[:, -1] - scores.latents[:, 0]
  # Layer 2 over layer 1, depth by depth: positive at the top and negative at
  # the bottom if layers sort themselves.
  lead = gain[:, 1] - gain[:, 0]
  # There is one query. Leaves 0, 2, ... have the strong edges.
  probs = np.asarray(jax.nn.softmax(seen.blocks[0].attn_logits[:, :, 0]))
  return {
      "accuracy": intervals.interval(seen.accuracy, least=0, most=1),
      "loss": intervals.interval(seen.loss),
      "entropy": intervals.interval(stack("entropy")),
      "stable_rank": intervals.interval(stack("stable_rank")),
      "scores": intervals.interval(scores.latents, most=1),
      "chance": intervals.interval(scores.chance),
      "gain": intervals.interval(gain),
      "sorting": intervals.interval(lead[:, 0] - lead[:, -1]),
      "strong_share": intervals.interval(probs[..., ::2].sum(axis=-1)),
  }


def _finding(cases: dict[str, dict[str, Any]]) -> str:
  def at(case: str, name: str, layer: int, depth: int) -> str:
    parts = {
        key: value[layer, depth] for key, value in cases[case][name].items()
    }
    return intervals.text(parts, 2)

  gain = cases["learned"]["gain"]
  sorting = cases["learned"]["sorting"]
  top, bottom = 0, gain["mean"].shape[1] - 1
  if gain["low"].max() <= 0:
    verdict = "Training does not bring the nodes closer to the latents"
  elif sorting["low"] > 0:
    verdict = "Layers sort themselves by depth"
  else:
    verdict = "Layers do not sort themselves by depth"
  clauses = [
      f"{case} attention gains {at(case, 'gain', 0, depth)} in layer 1 and"
      f" {at(case, 'gain', 1, depth)} in layer 2 on depth {depth}"
      for case in ("learned", "frozen")
      for depth in (top, bottom)
  ]
  return (
      f"{verdict} (contrast {intervals.text(sorting)}): over the untrained"
      f" nodes {'; '.join(clauses)} (shuffled labels:"
      f" {at('shuffled', 'gain', 1, top)} in layer 2 on depth {top}); held-out"
      f" accuracy {cases['learned']['accuracy']['mean'][-1]:.2f} with learned"
      f" and {cases['frozen']['accuracy']['mean'][-1]:.2f} with frozen"
      " attention, of which strong leaves get a share of"
      f" {cases['learned']['strong_share']['mean'][-1]:.2f} if learned."
  )


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the figure of a summary."""
  cases = summary["cases"]
  times = np.asarray(summary["score_steps"])
  steps = np.asarray(summary["steps"])
  scores = np.asarray(cases["learned"]["scores"]["mean"])
  places = [
      (layer, depth)
      for depth in reversed(range(scores.shape[2]))
      for layer in range(scores.shape[1])
  ]
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.9)
    ends, course, share = figure.subplots(1, 3)
    looks = _draw_ends(ends, cases, places)
    curves = drawing.looks_of([str(place) for place in places])
    for layer, depth in places:
      parts = {
          key: np.asarray(value)[:, layer, depth]
          for key, value in cases["learned"]["scores"].items()
      }
      label = f"layer {layer + 1}, depth {depth}"
      look = curves[str((layer, depth))]
      drawing.draw_interval(course, times, parts, look, label)
    course.set(title="learned attention", xlabel="step", ylim=(0, 1))
    course.legend(loc="lower right")
    for case in ("learned", "frozen"):
      strong = cases[case]["strong_share"]
      drawing.draw_interval(share, steps, strong, looks[case], case)
    share.set(title="attention on strong leaves", xlabel="step", ylim=(0, 1))
    figures.put_legend_above(figure, figures.legend_entries(ends))
  return figure


def _draw_ends(
    axes: mpl_axes.Axes,
    cases: Mapping[str, Any],
    places: Sequence[tuple[int, int]],
) -> dict[str, figures.CurveStyle]:
  """Draws the last scores beside what chance gives; returns the looks."""
  floors = {
      "learned": cases["learned"]["scores"],
      "frozen": cases["frozen"]["scores"],
      "untrained": cases["learned"]["scores"],
      "shuffled labels": cases["shuffled"]["scores"],
      "other samples": cases["learned"]["chance"],
  }
  looks = drawing.looks_of([*floors])
  shifts = drawing.shifts(len(floors))
  for shift, (name, parts) in zip(shifts, floors.items(), strict=True):
    time = 0 if name == "untrained" else -1
    values = _at(parts, time, places)
    x = np.arange(len(places)) + shift
    look = looks[name]._replace(linestyle="")
    drawing.draw_points(axes, x, values, look, name)
  axes.set(title="end of training", ylabel="correlation", ylim=(0, 1))
  axes.set_xticks(range(len(places)))
  axes.set_xticklabels(
      [f"layer {layer + 1}\ndepth {depth}" for layer, depth in places],
      fontsize=7,
  )
  return looks


def _at(
    parts: Mapping[str, Any], time: int, places: Sequence[tuple[int, int]]
) -> np.ndarray:
  return np.array([
      [np.asarray(parts[key])[time, layer, depth] for layer, depth in places]
      for key in ("mean", "low", "high")
  ])


STUDY = study_lib.Study(
    title="Open question: two layers on a latent tree",
    config=TwoLayerHbltConfig(),
    measure=study_lib.streamed("two_layer_hblt", measure),
    draw=draw,
    caption=(
        "Correlation of the best hidden node with the latents of a tree, mean"
        " over the latents of a depth (0: right under the root), on held-out"
        " samples: at the end, with floors, and along training. Bottom: share"
        " of the first layer's attention on leaves with a strong edge."
        f" {study_lib.BANDS}"
    ),
)
