"""Do weights of positions alone carry over to numbers of another size?

Positional Attention (https://arxiv.org/abs/2410.01686) learns algorithms on
lists of numbers, with queries and keys of positions alone, and keeps its error
where the numbers are larger than any it was trained on; attention whose weights
depend on the numbers does not. Layers are

  attended = attention(x),   x <- W_2 relu(W_1 [x, attended])

without residual, not causal, without biases, and log2 n + 1 of them; lists of n
numbers from [-2, 2] become their sorted list, or running sums or minima. The
paper's scratch node is left out. Standard attention reads x with a learned
table of positions added.

The figure shows the mean squared error on numbers from [-2 c, 2 c].

Paper's settings: those of the system `positional`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from joma.studies import training
  from joma.studies.systems.subjects import positional_network as networks
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

KINDS = ("positional", "standard")
TASKS = ("sort", "sum", "min")
SCALES = (1, 3, 5, 10)
_GATE = 5  # Scale at which the claim is decided.
# Medians over ten runs, from the result files of the paper's code, by scale.
_PUBLISHED: dict[tuple[str, str], dict[int, float]] = {
    ("sort", "positional"): {1: 1.2e-4, 3: 4.6e-3, 5: 2.4e-2, 10: 0.146},
    ("sort", "standard"): {1: 9.1e-4, 3: 2.1, 5: 11, 10: 54.5},
    ("sum", "positional"): {1: 1.7e-5, 3: 1.6e-3, 5: 8.6e-3, 10: 0.059},
    ("sum", "standard"): {1: 1.1e-5, 3: 1.9, 5: 11.6, 10: 87.6},
    ("min", "positional"): {10: 0.043},
    ("min", "standard"): {10: 19.7},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionalConfig:
  """Do weights of positions alone carry over to larger numbers?

  Attributes:
    num_seeds: Runs of each task and kind of attention.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    tasks: What is learned, of sort, sum and min.
    num_inputs: Numbers n of a list, a power of two.
    width: Width of the residual-free layers.
    num_steps: Steps of training, a multiple of num_records.
    num_records: Records of each run.
    batch_size: Lists of a step.
    rate: Highest learning rate.
    num_test: Lists that are tested at each scale.
  """

  num_seeds: int = 4
  first_seed: int = 0
  tasks: tuple[str, ...] = TASKS
  num_inputs: int = 8
  width: int = 32
  num_steps: int = 1500
  num_records: int = 15
  batch_size: int = 128
  rate: float = 3e-3
  num_test: int = 2000

  def __post_init__(self):
    settings_lib.check_runs(self)
    require.between("num_inputs", self.num_inputs, 2, 64)
    for name in ("width", "batch_size", "num_test"):
      require.at_least(name, getattr(self, name), 1)
    require.positive("rate", self.rate)
    settings_lib.require_choices("tasks", self.tasks, TASKS)


def measure(
    config: PositionalConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains both kinds on all tasks and tests them on larger numbers.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "errors" of each task, kind and scale, geometric mean over seeds and its
    interval; "ratios" of standard to positional at the deciding scale;
    "linearity", |f(5 x) - 5 f(x)| / |f(5 x)| over all lists, of the worst run;
    "flops" of a call; "claims" and "finding".
  """
  part = part or parts.at_once
  runs = {
      f"{task} {kind}": part(
          f"{task} {kind}",
          lambda kind=kind, task=task: _run(
              config, _network(config, kind, task)
          ),
      )
      for task in config.tasks
      for kind in KINDS
  }
  ratios = {
      task: intervals.interval(
          np.divide(*(
              np.array(runs[f"{task} {kind}"]["errors"][str(_GATE)])
              for kind in KINDS[::-1]
          )),
          is_positive=True,
      )
      for task in config.tasks
  }
  errors = {
      task: {
          kind: {
              scale: intervals.interval(np.array(values), is_positive=True)
              for scale, values in runs[f"{task} {kind}"]["errors"].items()
          }
          for kind in KINDS
      }
      for task in config.tasks
  }
  linearity = {
      kind: max(runs[f"{task} {kind}"]["linearity"] for task in config.tasks)
      for kind in KINDS
  }
  flops = {kind: _flops(_network(config, kind, "sort")) for kind in KINDS}
  rows = _claims(ratios, linearity, flops)
  return {
      "scales": list(SCALES),
      "num_seeds": config.num_seeds,
      "errors": errors,
      "ratios": ratios,
      "linearity": linearity,
      "flops": flops,
      "claims": rows,
      "finding": claims.finding(rows),
  }


def _network(
    config: PositionalConfig, kind: str, task: str
) -> networks.Network:
  return networks.Network(
      kind=kind,
      task=task,
      num_inputs=config.num_inputs,
      width=config.width,
      batch_size=config.batch_size,
  )


def _run(config: PositionalConfig, network: networks.Network) -> dict[str, Any]:
  seeds = settings_lib.seeds(config)
  trained = training.train(
      network,
      seeds,
      schedule=training.Schedule(
          num_steps=config.num_steps, num_records=config.num_records
      ),
      rate=config.rate,
  )
  test = jax.jit(network.error, static_argnums=3)
  every = [trained.params_of(run) for run in range(len(seeds))]
  # No seed of training.
  keys = [jax.random.fold_in(jax.random.key(seed), 7) for seed in seeds]
  found = {
      str(scale): [
          float(test(params, key, float(scale), config.num_test))
          for params, key in zip(every, keys, strict=True)
      ]
      for scale in SCALES
  }
  x = networks.draw_lists(keys[0], (config.num_test, config.num_inputs), 1.0)
  apply = jax.jit(network.apply)
  far = [apply(params, _GATE * x) for params in every]
  near = [_GATE * apply(params, x) for params in every]
  return {
      "errors": found,
      "linearity": max(
          float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
          for a, b in zip(far, near, strict=True)
      ),
      "steps": trained.steps,
      "curves": trained.curves(),
  }


def _flops(network: networks.Network) -> dict[str, float]:
  """FLOPs of a call: for each list, and once whatever their number."""
  params = jax.eval_shape(network.init, jax.random.key(0))
  count = {}
  for batch in (64, 128):
    lists = jax.ShapeDtypeStruct((batch, network.num_inputs), jnp.float32)
    compiled = jax.jit(network.apply).lower(params, lists).compile()
    cost: Any = compiled.cost_analysis()
    count[batch] = float(cost["flops"])
  each = (count[128] - count[64]) / 64
  return {"each": each, "once": count[64] - 64 * each}


def _claims(
    ratios: dict[str, dict[str, float]],
    linearity: dict[str, float],
    flops: dict[str, dict[str, float]],
) -> list[claims.Row]:
  rows = [
      claims.row(
          f"{task}: on numbers {_GATE} times as large the error of standard"
          " attention is many times that of positional",
          "at least 100 times",
          f"{intervals.text(ratio, 0)} times (geometric mean)",
          ratio["mean"] >= 100,
      )
      for task, ratio in ratios.items()
  ]
  rows.append(
      claims.row(
          "f(c x) = c f(x) of a trained positional network without biases",
          "at most 1e-6 (relative norm), standard more than 1e-3",
          f"{linearity['positional']:.1e}, standard"
          f" {linearity['standard']:.1e}",
          linearity["positional"] <= 1e-6 and linearity["standard"] > 1e-3,
      )
  )
  saved = flops["standard"]["each"] - flops["positional"]["each"]
  rows.append(
      claims.row(
          "weights are computed once a call, not once a list",
          "FLOPs of weights stand once, and each list needs fewer",
          f"once {flops['positional']['once']:.0f} (standard"
          f" {flops['standard']['once']:.0f}), {saved:.0f} fewer a list",
          flops["positional"]["once"] > 0.5 * saved > 0,
      )
  )
  return rows


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the error against the size of the numbers, a panel a task."""
  scales = np.array(summary["scales"], float)
  tasks = list(summary["errors"])
  looks = dict(zip(KINDS, (drawing.WITH, drawing.WITHOUT), strict=True))
  with figures.style():
    figure, panels = figures.make_panels(len(tasks), "mean squared error")
    for axes, task in zip(panels, tasks, strict=True):
      for kind, look in looks.items():
        found = summary["errors"][task][kind]
        values = drawing.points([found[str(c)] for c in summary["scales"]])
        drawing.draw_points(axes, scales, values, look, f"{kind} attention")
        known = _PUBLISHED[task, kind]
        figures.draw_known_points(
            axes,
            np.array([*known], float),
            np.array([*known.values()]),
            look=look._replace(linestyle=""),
        )
      axes.set(
          title=task,
          xlabel="size of the numbers $c$",
          xscale="log",
          yscale="log",
      )
      axes.set_xticks(scales, [f"{c:g}" for c in scales], minor=False)
      axes.set_xticks([], minor=True)
    entries = figures.legend_entries(panels[0])
    entries["paper"] = figures.known_entry()
    figures.put_legend_above(figure, entries)
  return figure


STUDY = study_lib.Study(
    title="Positional attention: numbers of another size",
    config=PositionalConfig(),
    smoke=dict(
        tasks=("sort",),
        num_inputs=4,
        width=8,
        batch_size=4,
        num_test=8,
        num_seeds=2,
        num_steps=2,
        num_records=2,
    ),
    measure=study_lib.in_parts("positional", measure),
    draw=draw,
    caption=(
        "Mean squared error of networks trained on lists of numbers from"
        " [-2, 2] and tested on [-2 c, 2 c]: geometric mean over seeds and its"
        " 95 % interval (Student's t). Open markers: medians over ten runs of"
        " the paper's code."
    ),
    report_title="Attention systems",
)
