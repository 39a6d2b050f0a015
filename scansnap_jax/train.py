"""The training loop of the one-layer experiments.

`train_and_evaluate` sweeps seeds x eta_Z x eta_Y / eta_Z for each data setting.
All runs of a setting advance together, from one evaluation to the next. All
learning rates of a seed see the same batches and start from the same values. A
batch is a pure function of (seed, step), so a restart needs the step alone.

Letters as in `scansnap_jax`.
"""

from collections.abc import Callable
import itertools
import pathlib
from typing import Any, NamedTuple

import jax
from jaxtyping import Float, PyTree
import numpy as np

from scansnap_jax import config as config_lib
from scansnap_jax import data
from scansnap_jax import ensemble
from scansnap_jax import run as run_lib
from scansnap_jax.experiment import loop
from scansnap_jax.experiment.processes import preemption

_DRAWN_TOGETHER = 50  # Batches that a device draws in one call.


class History(NamedTuple):
  """What was recorded of all runs; NaN where it is still to come.

  Attributes:
    losses: Batch loss before each update.
    distinct_entropy: At each evaluation, the first one before training.
    common_mass: At each evaluation.
    attended: c_n at each evaluation, or at the last one alone unless the config
      asks to record attention.
  """

  losses: Float[np.ndarray, "R num_steps"]
  distinct_entropy: Float[np.ndarray, "R S"]
  common_mass: Float[np.ndarray, "R S"]
  attended: Float[np.ndarray, "R _ K M"]


class Result(NamedTuple):
  """The runs of one data setting.

  Attributes:
    num_last: Number of query tokens of the setting.
    classes: Its sequence classes.
    runs: Seeds and learning rates, leaves [R].
    steps: Steps of the evaluations, [S], from 0 to num_steps.
    history: What was recorded.
    params: Final parameters, leaves [R, ...]; None if they were not asked for.
  """

  num_last: int
  classes: data.SequenceClasses
  runs: run_lib.SweepRun
  steps: np.ndarray
  history: History
  params: PyTree | None


def train_and_evaluate(
    config: config_lib.ScanSnapConfig,
    workdir: pathlib.Path,
    *,
    experiment: str = "scansnap",
    keep_params: bool = True,
    on_progress: Callable[[int], None] = lambda num_run_steps: None,
) -> list[Result]:
  """Trains and evaluates every run of a sweep, from its last checkpoint on.

  Args:
    config: The sweep.
    workdir: Where `metrics.jsonl` and `checkpoints/` go.
    experiment: Its name in metric rows, folders and errors.
    keep_params: Return, and leave in the last checkpoint, the parameters of all
      runs. They are most of what a sweep would write, and no figure reads them.
    on_progress: Told how many steps of single runs have been taken since.

  Returns:
    One result per data setting.

  Raises:
    UserError: If a run diverges, or the checkpoints are of another config.
    Stopped: If SIGTERM or Ctrl-C asked to stop; the state has been saved.
  """
  runs = make_runs(config)
  layout = ensemble.make_ensemble(len(runs.seed))
  init, train = _compile(config, layout)
  schedule = loop.make_schedule(config)
  results = []
  with preemption.stop_requests() as stop_requested:
    for num_last in config.num_last:
      classes = data.make_classes(config.data, num_last)
      num_last = len(np.unique(classes.query))  # A classes file has its own.
      shared, members = share(classes), layout.scatter(runs)
      with _make_recorder(workdir, experiment, num_last, runs) as recorder:
        start, state, history = loop.resume(
            *(recorder, layout, init, (members, shared)),
            _start_history(config, classes, layout.num_members),
            needs_state=keep_params,
        )
        on_progress(start * layout.num_members)
        # From one evaluation to the next on the devices; between them the host
        # records, and may be asked to stop.
        for interval in schedule.intervals(start):
          # A pure function of (seed, step): nothing of the data is in a
          # checkpoint.
          batches = draw_batches(config, classes, interval.steps)
          state, *seen = train(state, (shared, batches))
          losses, (before, after) = layout.gather(seen)
          history.losses[:, interval.steps] = losses
          # Before anything is written: a run that diverged leaves no rows
          # behind.
          is_finite = layout.is_finite(after)
          recorder.check_finite(interval, history.losses, is_finite)
          if interval.start == 0:
            recorder.write(0, _record(runs, history, before, 0))
          rows = _record(runs, history, after, interval.evaluation)
          recorder.write(interval.end, rows, losses[:, -1])
          on_progress(len(interval.steps) * layout.num_members)
          # Agreed on by all hosts, or some would wait in the next collective.
          stop = preemption.on_any_process(stop_requested())
          if stop or interval.is_saved:
            keeps = keep_params or interval.end < config.num_steps
            loop.save(
                *(recorder, layout, interval, state, history), keep_state=keeps
            )
          if stop:
            recorder.stop(interval, config.num_steps)
      steps = schedule.evaluation_steps
      params = layout.gather(state.params) if keep_params else None
      results.append(Result(num_last, classes, runs, steps, history, params))
  return results


def _compile(
    config: config_lib.ScanSnapConfig, layout: ensemble.Ensemble
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """The programs that start all runs, and that take an interval's steps."""
  static = dict(model_config=config.model, optimizer_config=config.optimizer)
  # What a run was is given up to what it becomes: parameters lie there once.
  train = layout.map(run_lib.train, donate=True, **static)
  return layout.map(run_lib.init, **static), train


def _make_recorder(
    workdir: pathlib.Path,
    experiment: str,
    num_last: int,
    runs: run_lib.SweepRun,
) -> loop.Recorder:
  return loop.Recorder(
      workdir,
      f"{experiment}/num_last={num_last}",
      tags={"experiment": experiment, "num_last": num_last},
      runs=[
          f"seed={seed}, lr_z={lr_z:g}, lr_ratio={lr_ratio:g}"
          for seed, _, lr_z, lr_ratio in zip(*runs, strict=True)
      ],
      rates="lr_z or lr_ratio",
      settings=run_lib.SweepRun._fields,
  )


def make_runs(config: config_lib.ScanSnapConfig) -> run_lib.SweepRun:
  """Lists the runs of a data setting, seeds outermost; leaves [R]."""
  grid = itertools.product(
      range(config.num_seeds), config.lr_z, config.lr_ratio
  )
  stream, lr_z, lr_ratio = (np.array(axis) for axis in zip(*grid, strict=True))
  return run_lib.SweepRun(
      seed=(config.first_seed + stream).astype(np.int32),
      stream=stream.astype(np.int32),
      lr_z=lr_z,
      lr_ratio=lr_ratio,
  )


def share(classes: data.SequenceClasses) -> run_lib.Shared:
  """The arrays of the sequence classes, on the host, as the runs need them."""
  arrays: dict[str, Any] = {
      "probs": classes.probs.astype(np.float32),
      "support": classes.support,
      "query": classes.query.astype(np.int32),
      "label": classes.label.astype(np.int32),
      "is_distinct": classes.is_distinct,
      "is_common": classes.is_common,
      "class_probs": classes.class_probs.astype(np.float32),
  }
  return run_lib.Shared(**arrays)


def draw_batches(
    config: config_lib.ScanSnapConfig,
    classes: data.SequenceClasses,
    steps: np.ndarray,
) -> data.Batch:
  """The batches of some steps for every seed; leaves [num_seeds, N, B, ...].

  Always `_DRAWN_TOGETHER` batches at a time, and the tables of the classes are
  padded to a multiple of 64 rows, so that one compiled program serves every
  sweep: it takes longer to compile than most sweeps take to draw.
  """
  num_padding = -classes.num_classes % 64
  support_probs = np.pad(classes.support_probs, ((0, num_padding), (0, 0)))
  class_cdf = np.pad(classes.class_cdf, (0, num_padding), constant_values=1)
  layout = ensemble.make_ensemble(jax.device_count())
  draw = layout.map(
      run_lib.draw, batch_size=config.batch_size, seq_len=config.data.seq_len
  )
  seeds = config.first_seed + np.arange(config.num_seeds)
  pairs = np.stack(np.meshgrid(seeds, steps, indexing="ij")).reshape(2, -1)
  num_pairs, at_once = pairs.shape[1], layout.num_members * _DRAWN_TOGETHER
  # The last pair is drawn again where the last group is not full.
  groups = np.pad(pairs, ((0, 0), (0, -num_pairs % at_once)), mode="edge")
  drawn = [
      layout.gather(
          draw(layout.scatter(tuple(group)), (support_probs, class_cdf))
      )
      for group in (
          groups.astype(np.int32)
          .reshape(2, -1, layout.num_members, _DRAWN_TOGETHER)
          .swapaxes(0, 1)
      )
  ]
  shape = (config.num_seeds, len(steps))
  return jax.tree.map(
      lambda *parts: np.concatenate(parts)
      .reshape(-1, *parts[0].shape[2:])[:num_pairs]
      .reshape(*shape, *parts[0].shape[2:]),
      *drawn,
  )


def _start_history(
    config: config_lib.ScanSnapConfig,
    classes: data.SequenceClasses,
    num_runs: int,
) -> History:
  num_evaluations = len(loop.make_schedule(config).evaluation_steps)
  # c_n of every evaluation would be large: K M numbers a run.
  recorded = num_evaluations if config.record_attention else 1
  empty = lambda *shape: np.full((num_runs, *shape), np.nan, np.float32)
  return History(
      losses=empty(config.num_steps),
      distinct_entropy=empty(num_evaluations),
      common_mass=empty(num_evaluations),
      attended=empty(recorded, classes.num_classes, classes.num_tokens),
  )


def _record(
    runs: run_lib.SweepRun,
    history: History,
    seen: run_lib.Observation,
    evaluation: int,
) -> list[dict[str, Any]]:
  """Keeps an evaluation of all runs; returns a metric row for each."""
  history.distinct_entropy[:, evaluation] = seen.distinct_entropy
  history.common_mass[:, evaluation] = seen.common_mass
  history.attended[:, min(evaluation, history.attended.shape[1] - 1)] = (
      seen.attended
  )
  return [
      {
          "seed": runs.seed[r],
          "lr_z": runs.lr_z[r],
          "lr_ratio": runs.lr_ratio[r],
          "distinct_entropy": seen.distinct_entropy[r],
          "common_mass": seen.common_mass[r],
          "population_loss": seen.population_loss[r],
      }
      for r in range(len(runs.seed))
  ]
