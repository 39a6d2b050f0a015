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

from typing import Any

from joma import question_config as config_lib
from joma.block import data
from joma.studies import two_layer_hblt
from scansnap_jax.experiment import intervals

LABELS = ("true", "shuffled")


def measure(
    config: config_lib.NoisyHbltConfig,
    *,
    on_metrics: intervals.OnMetrics | None = None,
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
  seeds = range(config.first_seed, config.first_seed + config.num_seeds)
  settings = {}
  for polarity in config.polarities:
    trees = [
        data.binary_tree(
            seed,
            num_classes=config.num_classes,
            num_roots=config.num_roots,
            branching=config.branching,
            polarity=polarity,
        )
        for seed in seeds
    ]
    for labels in LABELS:
      settings[f"{polarity:g}/{labels}"] = [
          two_layer_hblt.member(
              tree, config.step_size, is_shuffled=labels == "shuffled"
          )
          for tree in trees
      ]
  runs = two_layer_hblt.train(config, settings, num_scores=1)
  rows = {}
  for polarity in config.polarities:
    true, shuffled = (
        runs.score_of(f"{polarity:g}/{labels}").latents for labels in LABELS
    )
    accuracy = runs[f"{polarity:g}/true"].accuracy
    rows[f"{polarity:g}"] = {
        "trained": intervals.interval(true[:, 1], most=1),
        "untrained": intervals.interval(true[:, 0], most=1),
        "shuffled": intervals.interval(shuffled[:, 1], most=1),
        "gain": intervals.interval(true[:, 1] - true[:, 0]),
        "gain_shuffled": intervals.interval(true[:, 1] - shuffled[:, 1]),
        "accuracy": intervals.interval(accuracy[:, -1], most=1),
    }
  accuracies = {name: runs[name].accuracy for name in runs.names}
  intervals.emit(on_metrics, runs.steps, accuracies)
  return {
      "steps": runs.steps,
      "polarities": list(config.polarities),
      "num_seeds": config.num_seeds,
      "num_classes": config.num_classes,
      "rows": rows,
      "finding": _finding(rows),
  }


def _finding(rows: dict[str, dict[str, Any]]) -> str:
  def at(name, curve, layer, depth):
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
