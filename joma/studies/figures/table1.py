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

C is the number of classes, N_ch how many latents each latent combines, s the
level, as in the paper.

Paper's settings: width 1,024, three blocks, Adam at 1e-4 with L2 of 1e-4,
10,000 steps of 128 sequences, 12 cells (the authors' script, whose README has
1e-5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from etils import epy

from joma.hierarchy import config as config_lib
from joma.studies import study as study_lib

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  from matplotlib import axes as mpl_axes
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.hierarchy import data
  from joma.hierarchy import train
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import progress

_START, _END = 0, -1
_NUM_LATENT_LEVELS = 2  # Above them are the classes themselves.


def measure(
    config: config_lib.Table1Config, workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains from the last checkpoint on, and summarizes the runs.

  Args:
    config: The table.
    workdir: Where metrics.jsonl and checkpoints go.

  Returns:
    As `summarize`.

  Raises:
    preemption.Stopped: If asked to stop.
  """
  with progress.bar(
      "table1",
      total=config.num_runs * config.num_steps,
      unit="runs",
      per_step=1 / config.num_steps,
  ) as on_progress:
    results = train.train_and_evaluate(config, workdir, on_progress=on_progress)
  return summarize(config, results)


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

  def mean(values: np.ndarray, evaluation: int) -> dict[str, float | None]:
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


def _spread(values: np.ndarray) -> dict[str, float | None]:
  """Mean and sample standard deviation over seeds; None of a single one."""
  std = float(values.std(ddof=1)) if len(values) > 1 else None
  return {"mean": float(values.mean()), "std": std}


def _mean_over_cells(levels: list[dict[str, Any]]) -> dict[str, float]:
  return {
      name: float(np.mean([level[name]["mean"] for level in levels]))
      for name in levels[0]
  }


def _find(mean: list[dict[str, float]]) -> str:
  """Says what training adds to the scores of each level, beyond the floors."""
  low, high = mean
  own = high["trained"] - high["untrained"]
  # Shuffled latents gain as nodes spread out in training: only what own ones
  # gain beyond it is about latents.
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


# Rows of the figure: title, and name of each score with its legend.
_ROWS = (
    (
        "on the classes",
        {
            "trained": "trained",
            "untrained": "untrained",
            "shuffled": "trained, shuffled latents",
        },
    ),
    (
        "on unseen combinations",
        {
            "unseen": "best node, trained",
            "untrained_unseen": "best node, untrained",
            "transferred": "node of the classes, trained",
            "untrained_transferred": "node of the classes, untrained",
        },
    ),
)
_LOOKS = {
    "trained": ("#0072B2", "o", ""),
    "untrained": ("#7A7A7A", "v", ""),
    "shuffled": ("#D55E00", "s", ""),
    "unseen": ("#0072B2", "D", ""),
    "untrained_unseen": ("#7A7A7A", "d", ""),
    "transferred": ("#009E73", "P", ""),
    "untrained_transferred": ("#E69F00", "X", ""),
}


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the scores of both levels beside their floors, one column a cell."""
  cells = summary["cells"]
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 5.6)
    parts = figure.subfigures(
        2, 1, squeeze=False, height_ratios=(1, 1.25)
    ).ravel()
    for part, (title, names) in zip(parts, _ROWS, strict=True):
      panels = part.subplots(1, 2, sharey=True)
      for level, axes in enumerate(panels):
        _draw_panel(axes, [cell["levels"][level] for cell in cells], names)
        axes.set_title(f"level {level}, {title}")
        axes.set_xticks(range(len(cells)), [])
      panels[0].set_ylabel("correlation")
      figures.put_legend_above(part, figures.legend_entries(panels[0]))
    labels = [_label(cell) for cell in cells]
    for axes in parts[-1].axes:
      axes.set_xticks(range(len(cells)), labels, rotation=90)
      axes.set_xlabel("$C$, $N_{ch}$, latents of level 0 + 1")
  return figure


def _draw_panel(
    axes: mpl_axes.Axes,
    levels: list[Mapping[str, Any]],
    names: Mapping[str, str],
) -> None:
  """Draws one panel; points of a cell are set apart sideways."""
  for i, (name, label) in enumerate(names.items()):
    mean, spread = (  # No deviation of a single seed: NaN, and no bar.
        np.array([level[name][kind] for level in levels], float)
        for kind in ("mean", "std")
    )
    x = np.arange(len(levels)) + 0.15 * (i - (len(names) - 1) / 2)
    figures.draw_points(
        axes, x, mean, spread, figures.CurveStyle(*_LOOKS[name]), label
    )
  axes.grid(False, axis="x")
  axes.set(xlim=(-0.7, len(levels) - 0.3))


def _label(cell: Mapping[str, Any]) -> str:
  latents = "+".join(map(str, cell["num_latents"]))
  return f"{cell['num_classes']}, {cell['num_combinations']}, {latents}"


STUDY = study_lib.Study(
    title="Table 1: hidden nodes and the latents of a hierarchy",
    config=config_lib.table1(),
    measure=measure,
    draw=draw,
    caption=(
        "Correlation of the latents of level s with their best hidden node in"
        " block s, mean and sample standard deviation over seeds. Above: on the"
        " classes, as in the paper, after and before training, and after"
        " training against latents shuffled over the classes. Below: on"
        " combinations of latents that no class has, of the best node there and"
        " of the node chosen on the classes, after and before training. Below"
        " each column: classes C, latents combined N_ch, latents of level 0"
        " and 1."
    ),
)
