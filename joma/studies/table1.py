"""Table 1: do hidden nodes find the latents of a hierarchy?

A three-block Transformer learns the classes of a hierarchy of latents
(`joma.hierarchy.data`). A latent's score is the correlation of the hidden node
that follows it best, in the block of its level
(https://arxiv.org/abs/2310.00535, Table 1). Beside every score of the trained
network stand its floors (joma/hierarchy/scores.py): the network before
training, the same network against latents permuted over the classes, and scores
on combinations of latents that no class has.

Averages are over the latents that some class holds and some does not; the
others score exactly 0. `all` keeps them, as the paper's code does.

Letters: C classes, N_ch latents that each latent combines, s level.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from joma.hierarchy import config as config_lib
from joma.hierarchy import data
from joma.hierarchy import train

_START, _END = 0, -1
_NUM_LATENT_LEVELS = 2  # Above them are the classes themselves.


def summarize(
    config: config_lib.Table1Config, results: Sequence[train.Result]
) -> dict[str, Any]:
  """Turns the runs of the table into its numbers.

  Args:
    config: The table.
    results: One per cell, as `train.train_and_evaluate` returns them.

  Returns:
    `cells`, one dict a cell, whose scores are dicts of `mean` and `std` (of the
    sample) over seeds; `mean`, the scores averaged over cells; `finding`.
  """
  cells = [_summarize_cell(result) for result in results]
  levels = range(_NUM_LATENT_LEVELS)
  mean = [
      _mean_over_cells([cell["levels"][s] for cell in cells]) for s in levels
  ]
  return {
      "num_seeds": config.num_seeds,
      "num_steps": config.num_steps,
      "embed_dim": config.embed_dim,
      "cells": cells,
      "mean": mean,
      "finding": _find(mean),
  }


def _summarize_cell(result: train.Result) -> dict[str, Any]:
  history = result.history
  per_seed = lambda fn: np.array([fn(one) for one in result.hierarchies])
  unused = lambda s: per_seed(lambda one: 1 - one.activity[s].any(0).mean())
  losses = history.losses
  return {
      "num_classes": result.cell.num_classes,
      "num_combinations": result.cell.num_combinations,
      "num_latents": list(result.cell.num_latents),
      "distinct_sequences": _spread(
          per_seed(lambda one: one.num_distinct_sequences)
      ),
      "unused_fraction": [
          _spread(unused(s)) for s in range(_NUM_LATENT_LEVELS)
      ],
      # The last steps, as a single batch is noise.
      "loss": _spread(losses[:, -min(20, losses.shape[1]) :].mean(axis=1)),
      "least_loss": _spread(per_seed(least_loss)),
      "accuracy": _spread(history.accuracy[:, _END]),
      "levels": [
          _summarize_level(result, s) for s in range(len(history.scores))
      ],
  }


def _summarize_level(result: train.Result, level: int) -> dict[str, Any]:
  """The scores of a level, averaged over its latents, spread over seeds."""
  scores = result.history.scores[level]
  is_used = [one.is_used(level) for one in result.hierarchies]

  def mean(values, evaluation):
    return _spread(
        np.array([
            own[evaluation, used].mean()
            for own, used in zip(values, is_used, strict=True)
        ])
    )

  found = {
      "trained": mean(scores.own, _END),
      "untrained": mean(scores.own, _START),
  }
  if level >= _NUM_LATENT_LEVELS:
    # Permuted classes are the classes, and unseen combinations have none.
    return found
  return found | {
      "trained_all": _spread(scores.own[:, _END].mean(axis=1)),
      "untrained_all": _spread(scores.own[:, _START].mean(axis=1)),
      "shuffled": mean(scores.shuffled, _END),
      "untrained_shuffled": mean(scores.shuffled, _START),
      "unseen": mean(scores.unseen, _END),
      "untrained_unseen": mean(scores.unseen, _START),
      "transferred": mean(scores.transferred, _END),
      "untrained_transferred": mean(scores.transferred, _START),
  }


def least_loss(one: data.Hierarchy) -> float:
  """The loss that remains as some classes share their sequence, in nats.

  A class whose sequence g classes share has probability 1/g at best: the mean
  of ln g over classes.
  """
  _, group, size = np.unique(
      one.is_present, axis=0, return_inverse=True, return_counts=True
  )
  return float(np.log(size[group.reshape(-1)]).mean())


def _spread(values: np.ndarray) -> dict[str, float]:
  """Mean and sample standard deviation over seeds; 0 of a single one."""
  std = values.std(ddof=1) if len(values) > 1 else 0.0
  return {"mean": float(values.mean()), "std": float(std)}


def _mean_over_cells(levels: list[dict[str, Any]]) -> dict[str, float]:
  return {
      name: float(np.mean([level[name]["mean"] for level in levels]))
      for name in levels[0]
  }


def _find(mean: list[dict[str, float]]) -> str:
  """Says what training adds to the scores of each level, beyond the floors."""
  low, high = mean
  own = high["trained"] - high["untrained"]
  floor = high["shuffled"] - high["untrained_shuffled"]
  unseen = high["unseen"] - high["untrained_unseen"]
  moved = high["transferred"] - high["untrained_transferred"]
  verdict = "no more than" if own <= floor else "more than"
  return (
      f"Level 0: training moves the score from {low['untrained']:.3f} to"
      f" {low['trained']:.3f}. Level 1: from {high['untrained']:.3f} to"
      f" {high['trained']:.3f} ({own:+.3f}), which is {verdict} what latents"
      f" shuffled over the classes gain ({floor:+.3f}, to"
      f" {high['shuffled']:.3f}); on combinations that no class has the best"
      f" node changes by {unseen:+.3f} (to {high['unseen']:.3f}) and the node"
      f" chosen on the classes by {moved:+.3f} (to {high['transferred']:.3f}),"
      f" so that training {_verdict(unseen, moved)}."
  )


def _verdict(unseen: float, moved: float) -> str:
  if unseen > 0 and moved > 0:
    return "finds latents that carry over"
  if unseen <= 0 and moved <= 0:
    return "finds the classes rather than their latents"
  return "finds the classes first and the latents hardly"
