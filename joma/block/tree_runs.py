"""Two blocks trained on the leaves of latent trees, scored on their latents.

Letters as in `joma.block`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree
import numpy as np

from joma.block import data
from joma.block import ensemble
from joma.block import loss as loss_lib
from joma.block import model
from joma.block import run as run_lib
from joma.theory import data as trees
from joma.theory import dynamics
from joma.theory import metrics

NUM_LAYERS = 2


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
      state: run_lib.TrainState,
      shared: PyTree = (),
      *,
      setting: run_lib.BlockSetting,
  ) -> Scores:
    """Scores each layer on each depth but that of the leaves."""
    del shared
    # Index 1: index 0 is the batch of the records.
    key = run_lib.held_out_key(state.run.seed, 1)
    drawn = trees.sample_hblt(
        key, state.run.source.tree, batch_size=self.num_samples
    )
    counts = drawn.nodes[-1].astype(jnp.float32)
    zeros = jnp.zeros_like(drawn.class_index)
    batch = run_lib.Batch(counts, zeros, zeros)
    _, sown = loss_lib.forward(state, batch, setting)
    # Rolled by one sample, latents of the same distribution that have nothing
    # to do with the nodes: the floor of the best of F.
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


def member(
    tree: trees.Hblt,
    step_size: float,
    *,
    is_frozen: bool = False,
    is_shuffled: bool = False,
) -> run_lib.BlockRun:
  """A run on this tree; all but frozen attention trains."""
  return ensemble.member(
      source=data.TreeSource(tree, np.bool_(is_shuffled)),
      lr_w=step_size,
      lr_z=0.0 if is_frozen else step_size,
      lr_readout=step_size,
  )


def train(
    settings: Mapping[str, Sequence[run_lib.BlockRun]],
    seeds: Sequence[int],
    *,
    num_tokens: int,
    num_classes: int,
    hidden_dim: int,
    batch_size: int,
    num_held_out: int,
    num_steps: int,
    num_records: int,
    num_scores: int,
) -> ensemble.BlockRuns:
  """Trains two blocks on trees and scores them (`Score`).

  Args:
    settings: Runs by the name of their setting, one a seed.
    seeds: Seeds of the runs.
    num_tokens: Leaves of a tree.
    num_classes: Classes of the root.
    hidden_dim: Hidden nodes of either layer.
    batch_size: Samples of a step.
    num_held_out: Samples that scores are measured on.
    num_steps: Steps.
    num_records: Measurements after the first one.
    num_scores: How often the nodes are held against the latents.

  Returns:
    The runs.
  """
  setting = run_lib.BlockSetting(
      blocks=_blocks(num_tokens, hidden_dim),
      num_classes=num_classes,
      draw=data.DrawTree(batch_size),
      optimizer="adam",
      readout_scale=1.0,
      has_fresh_batches=True,
  )
  return ensemble.train(
      settings,
      seeds,
      setting=setting,
      num_steps=num_steps,
      num_records=num_records,
      score=Score(num_held_out),
      num_scores=num_scores,
  )


def _blocks(num_tokens: int, hidden_dim: int) -> tuple[model.JomaBlock, ...]:
  """Blocks of equal width from uniform attention, without a query's residual.

  A tree has no query: every sample would get the same residual.
  """
  sizes = (num_tokens, *[hidden_dim] * NUM_LAYERS)
  return tuple(
      model.JomaBlock(
          num_tokens=below,
          hidden_dim=above,
          kind=dynamics.Block(attention="softmax", has_residual=False),
          w_scale=1.0,
          z_scale=0.0,
      )
      for below, above in zip(sizes, sizes[1:], strict=False)
  )
