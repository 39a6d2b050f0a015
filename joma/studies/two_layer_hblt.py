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

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from joma import question_config as config_lib
from joma.block import data as block_data
from joma.block import ensemble
from joma.block import model
from joma.block import train as block_train
from joma.theory import data
from joma.theory import dynamics
from joma.theory import metrics
from scansnap_jax.experiment import intervals

NUM_LAYERS = 2
CASES = ("learned", "frozen", "shuffled")


class Scores(NamedTuple):
  """Correlations of the best node, means over the latents of a depth.

  Attributes:
    latents: With the latents of the same samples, [layers, depths].
    chance: With those of other samples.
  """

  latents: Float[Array, "L H"]
  chance: Float[Array, "L H"]


@dataclasses.dataclass(frozen=True)
class Score:
  """Holds the nodes of a run against the latents of held-out samples.

  Attributes:
    num_samples: How many.
  """

  num_samples: int

  def __call__(
      self,
      state: block_train.TrainState,
      shared: Any = (),
      *,
      setting: block_train.Setting,
  ) -> Scores:
    """Scores each layer on each depth but that of the leaves."""
    del shared
    key = block_train.held_out_key(state.run.seed, 1)
    drawn = data.sample_hblt(
        key, state.run.source.tree, batch_size=self.num_samples
    )
    counts = drawn.nodes[-1].astype(jnp.float32)
    zeros = jnp.zeros_like(drawn.class_index)
    batch = block_train.Batch(counts, zeros, zeros)
    _, sown = block_train.forward(state, batch, setting)
    table = lambda shift: jnp.stack([
        jnp.stack([
            _mean_score(layer["hidden"][0], jnp.roll(nodes, shift, axis=0))
            for nodes in drawn.nodes[:-1]
        ])
        for layer in sown
    ])
    return Scores(table(0), table(1))


def _mean_score(
    hidden: Float[Array, "B F"], latents: Bool[Array, "B P"]
) -> Float[Array, ""]:
  scores = metrics.latent_scores(hidden[:, None], latents.astype(jnp.float32))
  return metrics.mean_score(scores.pearson, scores.is_used)


def measure(
    config: config_lib.TwoLayerHbltConfig,
    *,
    on_metrics: intervals.OnMetrics | None = None,
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
  tree_of = lambda seed: block_data.binary_tree(
      seed,
      num_classes=config.num_classes,
      num_roots=config.num_roots,
      branching=config.branching,
      polarity=config.polarity,
      weak_polarity=config.weak_polarity,
  )
  seeds = range(config.first_seed, config.first_seed + config.num_seeds)
  runs = train(
      config,
      {
          case: [
              member(
                  tree_of(seed),
                  config.step_size,
                  is_frozen=case == "frozen",
                  is_shuffled=case == "shuffled",
              )
              for seed in seeds
          ]
          for case in CASES
      },
      num_scores=config.num_scores,
  )
  cases = {case: _summarize(runs, case) for case in CASES}
  emitted = ("accuracy", "loss")
  intervals.emit(
      on_metrics,
      runs.steps,
      {
          f"{case}/{name}": row[name]["mean"][None]
          for case, row in cases.items()
          for name in emitted
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


def member(
    tree: data.Hblt,
    step_size: float,
    *,
    is_frozen: bool = False,
    is_shuffled: bool = False,
) -> block_train.Run:
  """A run on this tree; all but frozen attention trains."""
  return ensemble.member(
      source=block_data.TreeSource(tree, np.bool_(is_shuffled)),
      lr_w=step_size,
      lr_z=0.0 if is_frozen else step_size,
      lr_readout=step_size,
  )


def train(
    config: config_lib.TwoLayerHbltConfig | config_lib.NoisyHbltConfig,
    settings: dict[str, list[block_train.Run]],
    *,
    num_scores: int,
) -> ensemble.Runs:
  """Trains two blocks on trees and scores them as `score` does."""
  num_tokens = config.num_roots * int(np.prod(config.branching))
  sizes = (num_tokens, *[config.hidden_dim] * NUM_LAYERS)
  blocks = tuple(
      model.JomaBlock(
          num_tokens=below,
          hidden_dim=above,
          kind=dynamics.Block(attention="softmax", has_residual=False),
          w_scale=1.0,
          z_scale=0.0,
      )
      for below, above in zip(sizes, sizes[1:], strict=False)
  )
  setting = block_train.Setting(
      blocks=blocks,
      num_classes=config.num_classes,
      draw=block_data.DrawTree(config.batch_size),
      optimizer="adam",
      readout_scale=1.0,
      has_fresh_batches=True,
  )
  return ensemble.train(
      settings,
      range(config.first_seed, config.first_seed + config.num_seeds),
      setting=setting,
      num_steps=config.num_steps,
      num_records=config.num_records,
      score=Score(config.num_held_out),
      num_scores=num_scores,
  )


def _summarize(runs: ensemble.Runs, case: str) -> dict[str, Any]:
  seen, scores = runs[case], runs.score_of(case)
  stack = lambda name: np.stack(
      [getattr(block, name) for block in seen.blocks], axis=-1
  )
  gain = scores.latents[:, -1] - scores.latents[:, 0]
  lead = gain[:, 1] - gain[:, 0]
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
  def at(case, name, layer, depth):
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
