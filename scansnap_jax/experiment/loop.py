"""What the training loops call: intervals, saving, divergence, metric rows.

Each `train` module writes its loop out, from one evaluation to the next:

  with loop.Recorder(workdir, name, tags) as recorder:
    start, state, history = loop.resume(recorder, layout, init, args, history)
    for interval in schedule.intervals(start):
      ...advance, record...
      if interval.is_saved:
        loop.save(recorder, layout, interval, state, history)

As long as data are a pure function of (seed, step), a restart from the last
checkpoint gives the same bits.

Letters as in `scansnap_jax`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import pathlib
import types
from typing import (
    Any,
    NamedTuple,
    NoReturn,
    Protocol,
    TypeVar,
    runtime_checkable,
)

import jax
from jaxtyping import Bool, Float, Int, PyTree
import numpy as np

from scansnap_jax import ensemble
from scansnap_jax.experiment import checkpoint
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import metric_stream
from scansnap_jax.experiment.processes import devices
from scansnap_jax.experiment.processes import preemption


class Interval(NamedTuple):
  """The steps from one evaluation to the next.

  Attributes:
    start: First step.
    end: One after the last step, at which there is an evaluation.
    evaluation: Index of that evaluation; 0 is the one before training.
    is_saved: A checkpoint is due at the end.
  """

  start: int
  end: int
  evaluation: int
  is_saved: bool

  @property
  def steps(self) -> Int[np.ndarray, "N"]:
    """The steps that are taken."""
    return np.arange(self.start, self.end)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """When a run is evaluated and saved.

  Attributes:
    num_steps: Steps of the run.
    log_every: Steps between evaluations.
    checkpoint_every: Steps between checkpoints, each taken at the evaluation
      that reaches it; the last step is always saved.
  """

  num_steps: int
  log_every: int
  checkpoint_every: int

  @property
  def evaluation_steps(self) -> Int[np.ndarray, "S"]:
    """0, log_every, 2 log_every, ... and num_steps."""
    steps = np.arange(0, self.num_steps, self.log_every)
    return np.append(steps, self.num_steps)

  def intervals(self, start: int) -> Iterator[Interval]:
    """Yields the intervals that are left after `start` steps."""
    steps = self.evaluation_steps
    # A checkpoint lies on an evaluation, so that no interval is cut.
    first = int(np.searchsorted(steps, start, side="right"))
    for evaluation in range(first, len(steps)):
      begin, end = (
          int(step) for step in steps[evaluation - 1 : evaluation + 1]
      )
      every = self.checkpoint_every
      is_saved = begin // every < end // every or end == self.num_steps
      yield Interval(begin, end, evaluation, is_saved)


@runtime_checkable
class _Config(Protocol):
  """Settings that say when a run is evaluated and saved."""

  @property
  def num_steps(self) -> int:
    ...

  @property
  def log_every(self) -> int:
    ...

  @property
  def checkpoint_every(self) -> int:
    ...


def make_schedule(config: _Config) -> Schedule:
  """The schedule of a config."""
  return Schedule(
      num_steps=config.num_steps,
      log_every=config.log_every,
      checkpoint_every=config.checkpoint_every,
  )


@runtime_checkable
class _History(Protocol):
  """A NamedTuple of host arrays, filled as a run goes on."""

  @property
  def losses(self) -> Float[np.ndarray, "R num_steps"]:
    ...

  def _asdict(self) -> dict[str, Any]:
    ...


History = TypeVar("History", bound=_History)


class Recorder:
  """The metric rows and checkpoints of one setting, below a workdir.

  All processes make the same calls; the main one alone writes rows.
  """

  def __init__(
      self,
      workdir: pathlib.Path,
      name: str,
      *,
      tags: Mapping[str, Any],
      runs: Sequence[str],
      rates: str,
      settings: Collection[str] = ("seed",),
      refuses_nan: bool = True,
  ):
    """Opens the checkpoints.

    Args:
      workdir: Where `metrics.jsonl` and `checkpoints/` go.
      name: Folder of the setting below `checkpoints/`, also in errors.
      tags: What all its metric rows are about.
      runs: Names each run by its settings, for errors.
      rates: Names the settings to make smaller if a run diverges.
      settings: Names in rows that tell runs apart, for `write_runs` of
        `metric_stream.MetricStream`.
      refuses_nan: Whether losses that are no numbers end a run, as parameters
        that are none always do.
    """
    self._refuses_nan = refuses_nan
    self._settings = settings
    self._path, self._tags = workdir / "metrics.jsonl", tags
    self._name, self._runs, self._rates = name, runs, rates
    self._stack = contextlib.ExitStack()
    self._checkpointer = self._stack.enter_context(
        checkpoint.Checkpointer(workdir / "checkpoints" / name)
    )
    self._stream: metric_stream.MetricStream | None = None

  def resume(
      self, template: PyTree, history: History, *, needs_state: bool = True
  ) -> tuple[int, PyTree | None, History]:
    """Reads the last good checkpoint; rows from then on are written.

    Args:
      template: Shapes of what `save` is given as the state.
      history: What there is to be recorded, empty.
      needs_state: Whether a checkpoint without a state is refused.

    Returns:
      Steps taken, the saved state, None where there is none in it, and the
      history; 0, None and the empty history if there is no checkpoint.

    Raises:
      UserError: If the checkpoints are of another config.
    """
    others = [] if needs_state else [_tree(None, history)]
    restored = self._checkpointer.restore_latest(
        _tree(template, history), *others
    )
    step = restored.step if restored else 0
    if devices.is_main_process():
      # Rows behind the checkpoint stay; later ones will be written again.
      self._stream = self._stack.enter_context(
          metric_stream.MetricStream(
              self._path,
              resume_below=step + 1 if step else None,
              tags=self._tags,
          )
      )
    if restored is None:
      return 0, None, history
    saved = restored.tree
    return step, saved.get("state"), type(history)(**saved["history"])

  def restore(self, template: PyTree, history: History) -> PyTree | None:
    """Reads the state of the last good checkpoint once more.

    Args:
      template: As `resume`.
      history: As `resume`; what is saved of it is not read.

    Returns:
      The state; None if there is no checkpoint.
    """
    restored = self._checkpointer.restore_latest(_tree(template, history))
    return None if restored is None else restored.tree["state"]

  def write(
      self,
      step: int,
      rows: Sequence[Mapping[str, Any]],
      losses: Float[np.ndarray, "R"] | None = None,
  ) -> None:
    """Writes the metric rows of an evaluation.

    All that a row of step t says is of the weights after t updates, but for
    what is named after batches: `last_batch_loss` is the loss of the batch of
    update t before it, so of the weights after t - 1, and `train_loss`, where
    there is one, the mean of such losses since the row before. (Older files
    call the former `loss`.)

    Args:
      step: Its step, t.
      rows: One a run.
      losses: Of each run's last batch, before its update, if there is one.
    """
    if self._stream is None:
      return
    if losses is not None:
      rows = [
          {**row, "last_batch_loss": loss}
          for row, loss in zip(rows, losses, strict=True)
      ]
    self._stream.write_runs(step, rows, self._settings)

  def draw(self, step: int, name: str, image: Float[np.ndarray, "H W"]) -> None:
    """Shows a picture in the trackers."""
    if self._stream is not None:
      self._stream.draw(step, name, image)

  def save(
      self,
      interval: Interval,
      state: PyTree | None,
      history: _History,
      is_finite: Bool[np.ndarray, "R"],
  ) -> None:
    """Starts to write a checkpoint; state and history may change afterwards.

    Args:
      interval: The steps that were taken last.
      state: The state after them; None where nothing goes on from it.
      history: What was recorded.
      is_finite: Which runs have finite parameters; see `check_finite`.

    Raises:
      UserError: If a run diverged, or the disk is full.
    """
    self.check_finite(interval, history.losses, is_finite)
    self._checkpointer.save(interval.end, _tree(state, history))

  def check_finite(
      self,
      interval: Interval,
      losses: Float[np.ndarray, "R num_steps"],
      is_finite: Bool[np.ndarray, "R"],
  ) -> None:
    """Refuses to go on with, or to save, runs that diverged.

    Args:
      interval: The steps that were taken last.
      losses: Those of all steps; later ones do not matter.
      is_finite: Which runs have neither NaN nor infinity in what else came of
        the interval. A loss is taken before its update, so that the last update
        shows elsewhere alone.

    Raises:
      UserError: If a loss or a value is NaN or infinite.
    """
    # Later losses are NaN as they are still to come.
    losses = losses[:, : interval.end]
    is_good = is_finite
    if self._refuses_nan:
      is_good = np.isfinite(losses).all(axis=1) & is_finite
    if is_good.all():
      return
    r = int(np.argmin(is_good))
    # The first run that diverged stands for all in the message.
    finite = np.flatnonzero(np.isfinite(losses[r]))
    last = "none"
    if finite.size:
      last = f"{losses[r, finite[-1]]:.6g} at step {finite[-1]}"
    # Of the first interval nothing has been written yet.
    kept = f" Metrics up to step {interval.start} are kept."
    raise errors.UserError(
        f"{self._name} diverged between steps {interval.start} and"
        f" {interval.end}, with {self._runs[r]}: its last finite loss is"
        f" {last}.{kept if interval.start else ''} Use a smaller"
        f" {self._rates}, in a new workdir."
    )

  def stop(self, interval: Interval, num_steps: int) -> NoReturn:
    """Ends a run that was asked to stop and is saved, by raising Stopped."""
    raise preemption.Stopped(
        f"{self._name} at step {interval.end} of {num_steps}"
    )

  def __enter__(self) -> "Recorder":
    return self

  def __exit__(
      self,
      kind: type[BaseException] | None,
      error: BaseException | None,
      trace: types.TracebackType | None,
  ) -> None:
    self._stack.__exit__(kind, error, trace)


def _tree(state: PyTree | None, history: _History) -> dict[str, Any]:
  # What is not recorded, None, has no place in the file either.
  recorded = {k: v for k, v in history._asdict().items() if v is not None}
  return {"history": recorded} | ({} if state is None else {"state": state})


def resume(
    recorder: Recorder,
    layout: ensemble.Ensemble,
    init: Callable[..., PyTree],
    arguments: tuple[PyTree, PyTree],
    history: History,
    *,
    needs_state: bool = True,
) -> tuple[int, PyTree, History]:
  """Starts the runs of an ensemble, or takes them from the last checkpoint.

  Args:
    recorder: Of the setting.
    layout: How the runs lie on the devices.
    init: Lifted by `layout.map`: the state before the first step.
    arguments: What `init` takes: the members, laid out, and what they share.
    history: What there is to be recorded, empty.
    needs_state: As `Recorder.resume`.

  Returns:
    Steps taken, the state laid out, None where the checkpoint has none, and
    the history.

  Raises:
    UserError: If the checkpoints are of another config.
  """
  # The shapes are known without computing anything: a run that continues
  # draws no initial values, and compiles nothing for them.
  shapes = layout.gathered_shapes(jax.eval_shape(init, *arguments))
  start, saved, history = recorder.resume(
      shapes, history, needs_state=needs_state
  )
  if not start:
    return 0, init(*arguments), history
  state = None if saved is None else layout.scatter(saved)
  return start, state, history


def save(
    recorder: Recorder,
    layout: ensemble.Ensemble,
    interval: Interval,
    state: PyTree,
    history: _History,
    *,
    keep_state: bool = True,
) -> None:
  """Saves the runs of an ensemble, in no particular number of devices.

  Args:
    recorder: Of the setting.
    layout: How the runs lie on the devices.
    interval: The steps that were taken last.
    state: The state after them, with the field `params`.
    history: What was recorded.
    keep_state: False writes the history alone, for runs that are done.

  Raises:
    UserError: If a run diverged, or the disk is full.
  """
  # The last update shows in the parameters alone; see `check_finite`.
  gathered = layout.gather(state if keep_state else state.params)
  params = gathered.params if keep_state else gathered
  is_finite = layout.is_finite(params)
  recorder.save(interval, gathered if keep_state else None, history, is_finite)
