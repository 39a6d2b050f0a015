"""The training loop of the one-layer experiments.

`train_and_evaluate` sweeps seeds x eta_Z x eta_Y / eta_Z for each data setting.
All runs of a setting advance together (ensemble.py). All learning rates of a
seed see the same batches and start from the same values. A batch is a pure
function of (seed, step), so a restart needs the step alone.

Letters: R runs, E evaluations, K classes, M tokens.
"""

from collections.abc import Callable
import contextlib
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
from scansnap_jax.experiment import checkpoint
from scansnap_jax.experiment import devices
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import metric_stream
from scansnap_jax.experiment import preemption


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
  distinct_entropy: Float[np.ndarray, "R E"]
  common_mass: Float[np.ndarray, "R E"]
  attended: Float[np.ndarray, "R _ K M"]


class Result(NamedTuple):
  """The runs of one data setting.

  Attributes:
    num_last: Number of query tokens of the setting.
    classes: Its sequence classes.
    runs: Seeds and learning rates, leaves [R].
    steps: Steps of the evaluations, [E], from 0 to num_steps.
    history: What was recorded.
    params: Final parameters, leaves [R, ...].
  """

  num_last: int
  classes: data.SequenceClasses
  runs: run_lib.Run
  steps: np.ndarray
  history: History
  params: PyTree


def train_and_evaluate(
    config: config_lib.ScanSnapConfig,
    workdir: pathlib.Path,
    *,
    experiment: str = "scansnap",
    on_progress: Callable[[int], None] = lambda num_run_steps: None,
) -> list[Result]:
  """Trains and evaluates every run of a sweep, from its last checkpoint on.

  Args:
    config: The sweep.
    workdir: Where `metrics.jsonl` and `checkpoints/` go.
    experiment: Its name in metric rows, folders and errors.
    on_progress: Told how many steps of single runs have been taken since.

  Returns:
    One result per data setting.

  Raises:
    UserError: If a run diverges, or the checkpoints are of another config.
    Stopped: If SIGTERM or Ctrl-C asked to stop; the state has been saved.
  """
  with preemption.stop_requests() as stop_requested:
    return [
        _train_setting(
            config, num_last, workdir, experiment, on_progress, stop_requested
        )
        for num_last in config.num_last
    ]


def _train_setting(
    config: config_lib.ScanSnapConfig,
    num_last: int,
    workdir: pathlib.Path,
    experiment: str,
    on_progress: Callable[[int], None],
    stop_requested: Callable[[], bool],
) -> Result:
  """THE loop. Draws, trains, records and saves all runs of one setting."""
  classes = data.make_classes(config.data, num_last)
  shared = share(classes)
  runs = make_runs(config)
  layout = ensemble.make_ensemble(len(runs.seed))
  static = dict(model_config=config.model, optimizer_config=config.optimizer)
  train = layout.map(run_lib.train, donate=True, **static)
  steps = evaluation_steps(config)
  history = _start_history(config, classes)
  num_last = len(np.unique(classes.query))  # A classes file has its own.
  name = f"{experiment}/num_last={num_last}"
  tags = {"experiment": experiment, "num_last": num_last}

  with checkpoint.Checkpointer(workdir / "checkpoints" / name) as checkpointer:
    init = layout.map(run_lib.init, **static)
    start, state, history = _restore(
        checkpointer, layout, init, (layout.scatter(runs), shared), history
    )
    on_progress(start * len(runs.seed))
    with _metric_stream(workdir, tags, start) as stream:
      while start < config.num_steps:
        evaluation = int(np.searchsorted(steps, start, side="right"))
        end = int(steps[evaluation])
        batches = draw_batches(config, classes, np.arange(start, end))
        state, losses, seen = train(state, (shared, batches))
        losses, (before, after) = layout.gather((losses, seen))
        history.losses[:, start:end] = losses
        _check_finite(name, runs, history, after, start, end)
        if start == 0:
          _record(stream, runs, history, before, 0, step=0)
        _record(stream, runs, history, after, evaluation, step=end)
        on_progress((end - start) * len(runs.seed))
        stop = preemption.on_any_process(stop_requested())
        if stop or _is_due(config, start, end):
          on_host = layout.gather(state)
          _check_finite(name, runs, history, on_host.params, start, end)
          checkpointer.save(end, _to_save(on_host, history))
        if stop:
          raise preemption.Stopped(f"{name} at step {end} of {steps[-1]}")
        start = end
    params = layout.gather(state.params)
  return Result(num_last, classes, runs, steps, history, params)


def _metric_stream(workdir: pathlib.Path, tags: dict[str, Any], start: int):
  """The metric rows of a data setting, which the main process writes."""
  if not devices.is_main_process():
    return contextlib.nullcontext()
  return metric_stream.MetricStream(
      workdir / "metrics.jsonl",
      resume_below=start + 1 if start else None,
      tags=tags,
  )


def make_runs(config: config_lib.ScanSnapConfig) -> run_lib.Run:
  """Lists the runs of a data setting, seeds outermost; leaves [R]."""
  grid = itertools.product(
      range(config.num_seeds), config.lr_z, config.lr_ratio
  )
  stream, lr_z, lr_ratio = (np.array(axis) for axis in zip(*grid, strict=True))
  return run_lib.Run(
      seed=(config.first_seed + stream).astype(np.int32),
      stream=stream.astype(np.int32),
      lr_z=lr_z,
      lr_ratio=lr_ratio,
  )


def share(classes: data.SequenceClasses) -> run_lib.Shared:
  """The arrays of the sequence classes, on the host, as the runs need them."""
  arrays: Any = {
      "probs": classes.probs.astype(np.float32),
      "support": classes.support,
      "query": classes.query.astype(np.int32),
      "label": classes.label.astype(np.int32),
      "is_distinct": classes.is_distinct,
      "is_common": classes.is_common,
  }
  return run_lib.Shared(**arrays)


def evaluation_steps(config: config_lib.ScanSnapConfig) -> np.ndarray:
  """0, log_every, 2 log_every, ... and num_steps."""
  steps = np.arange(0, config.num_steps, config.log_every)
  return np.append(steps, config.num_steps)


def draw_batches(
    config: config_lib.ScanSnapConfig,
    classes: data.SequenceClasses,
    steps: np.ndarray,
) -> data.Batch:
  """The batches of some steps for every seed; leaves [num_seeds, N, B, ...].

  The tables of the classes are padded to a multiple of 64 rows, so that one
  compiled program serves the data settings of a sweep.
  """
  num_padding = -classes.num_classes % 64
  support_probs = np.pad(classes.support_probs, ((0, num_padding), (0, 0)))
  class_cdf = np.pad(classes.class_cdf, (0, num_padding), constant_values=1)
  layout = ensemble.make_ensemble(config.num_seeds)
  seeds = (config.first_seed + np.arange(config.num_seeds)).astype(np.int32)
  draw = layout.map(
      run_lib.draw, batch_size=config.batch_size, seq_len=config.data.seq_len
  )
  batches = draw(layout.scatter(seeds), (support_probs, class_cdf, steps))
  return layout.gather(batches)


def _start_history(
    config: config_lib.ScanSnapConfig, classes: data.SequenceClasses
) -> History:
  num_runs = len(make_runs(config).seed)
  num_evaluations = len(evaluation_steps(config))
  recorded = num_evaluations if config.record_attention else 1
  empty = lambda *shape: np.full((num_runs, *shape), np.nan, np.float32)
  return History(
      losses=empty(config.num_steps),
      distinct_entropy=empty(num_evaluations),
      common_mass=empty(num_evaluations),
      attended=empty(recorded, classes.num_classes, classes.num_tokens),
  )


def _to_save(state: run_lib.TrainState, history: History) -> dict[str, Any]:
  return {"state": state, "history": history._asdict()}


def _restore(
    checkpointer: checkpoint.Checkpointer,
    layout: ensemble.Ensemble,
    init: Callable[..., run_lib.TrainState],
    init_args: tuple[Any, ...],
    history: History,
) -> tuple[int, run_lib.TrainState, History]:
  """Step, state and history of the last good checkpoint, or of the start."""
  shape_of = lambda leaf: jax.ShapeDtypeStruct(
      (layout.num_members, *leaf.shape[2:]), leaf.dtype
  )
  shapes = jax.tree.map(shape_of, jax.eval_shape(init, *init_args))
  restored = checkpointer.restore_latest(_to_save(shapes, history))
  if restored is None:
    return 0, init(*init_args), history
  return (
      restored.step,
      layout.scatter(restored.tree["state"]),
      History(**restored.tree["history"]),
  )


def _is_due(config: config_lib.ScanSnapConfig, start: int, end: int) -> bool:
  """True if a checkpoint, or the last step, lies in (start, end]."""
  interval = config.checkpoint_every
  return start // interval < end // interval or end == config.num_steps


def _record(
    stream: metric_stream.MetricStream | None,
    runs: run_lib.Run,
    history: History,
    seen: run_lib.Observation,
    evaluation: int,
    step: int,
) -> None:
  """Keeps an evaluation of all runs and writes its metric rows, one a run."""
  history.distinct_entropy[:, evaluation] = seen.distinct_entropy
  history.common_mass[:, evaluation] = seen.common_mass
  history.attended[:, min(evaluation, history.attended.shape[1] - 1)] = (
      seen.attended
  )
  if stream is None:
    return
  for r in range(len(runs.seed)):
    row = {
        "seed": runs.seed[r],
        "lr_z": runs.lr_z[r],
        "lr_ratio": runs.lr_ratio[r],
        "distinct_entropy": seen.distinct_entropy[r],
        "common_mass": seen.common_mass[r],
    }
    if step:
      row["loss"] = history.losses[r, step - 1]
    stream.write(step, row)


def _check_finite(
    name: str,
    runs: run_lib.Run,
    history: History,
    values: PyTree,
    start: int,
    end: int,
) -> None:
  """Refuses to go on with, or to save, runs that diverged in [start, end).

  Args:
    name: What is being run.
    runs: Its runs.
    history: Holds the losses of the interval.
    values: What came of the interval, leaves [R, ...].
    start: First step of the interval.
    end: First step after it.

  Raises:
    UserError: If a loss or a value is NaN or infinite.
  """
  losses = history.losses[:, :end]
  is_good = np.isfinite(losses).all(axis=1)
  for leaf in jax.tree.leaves(values):
    is_good &= np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1)
  if is_good.all():
    return
  r = int(np.argmin(is_good))
  finite = np.flatnonzero(np.isfinite(losses[r]))
  last = (
      f"{losses[r, finite[-1]]:.6g} at step {finite[-1]}"
      if finite.size
      else "none"
  )
  raise errors.UserError(
      f"{name} diverged between steps {start} and {end}, with"
      f" seed={runs.seed[r]}, lr_z={runs.lr_z[r]:g},"
      f" lr_ratio={runs.lr_ratio[r]:g}: its last finite loss is {last}. Metrics"
      f" up to step {start} and the checkpoints before are kept. Use a smaller"
      " lr_z or lr_ratio, in a new workdir."
  )
