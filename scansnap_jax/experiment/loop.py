"""The loop of every training experiment: advance, record, check, save.

All runs of a setting advance together, laid out by `scansnap_jax.ensemble` or
another `Layout`, from one evaluation to the next. What a run is, what is
observed of it and where its data come from is said by a `Setting`. As long as
data are a pure function of (seed, step), a restart from the last checkpoint
gives the same bits.

Letters: R runs, N steps of an interval, E evaluations.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import pathlib
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Bool, Int, PyTree
import numpy as np

from scansnap_jax.experiment import checkpoint
from scansnap_jax.experiment import devices
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import metric_stream
from scansnap_jax.experiment import preemption


@runtime_checkable
class Layout(Protocol):
  """How R runs lie on devices."""

  @property
  def num_members(self) -> int:
    """R."""
    ...

  def gather(self, members: Any) -> Any:
    """Brings what is laid out to the host, as arrays [R, ...]."""
    ...

  def is_finite(self, members: Any) -> Bool[np.ndarray, "R"]:
    """Tells which runs are without NaN in what was gathered or saved."""
    ...

  def to_save(self, members: Any) -> Any:
    """Makes of a state, laid out, what a checkpoint holds of it."""
    ...

  def to_restore(self, members: Any) -> Any:
    """Makes the template of a checkpoint of the shapes of a state, laid out."""
    ...

  def from_saved(self, saved: Any) -> Any:
    """Lays out what a checkpoint held."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """The runs of one setting, and how they advance.

  Attributes:
    name: Its folder below `checkpoints/`, also in errors.
    tags: Of its metric rows.
    num_steps: Steps of each run.
    log_every: Steps between evaluations.
    checkpoint_every: Steps between checkpoints, each taken at the evaluation
      that reaches it; the last step is always saved.
    layout: How the runs lie on devices.
    init: Makes their state, laid out; it has a field `params`.
    advance: Takes the state, laid out, from a first step to one after the last;
      returns the new state, the losses before each update [R, N], and what is
      observed before and after; all laid out.
    record: Puts what was observed, leaves [R, ...], into the history at an
      evaluation; returns a metric row for each run.
    describe: Names a run by its settings.
    rates: Names the settings to make smaller if a run diverges.
  """

  name: str
  tags: Mapping[str, Any]
  num_steps: int
  log_every: int
  checkpoint_every: int
  layout: Layout
  init: Callable[[], Any]
  advance: Callable[[Any, int, int], tuple[Any, PyTree, tuple[PyTree, PyTree]]]
  record: Callable[[Any, Any, int], list[dict[str, Any]]]
  describe: Callable[[int], str]
  rates: str

  @property
  def evaluation_steps(self) -> Int[np.ndarray, "E"]:
    """0, log_every, 2 log_every, ... and num_steps."""
    steps = np.arange(0, self.num_steps, self.log_every)
    return np.append(steps, self.num_steps)


def run(
    setting: Setting,
    history: Any,
    workdir: pathlib.Path,
    *,
    on_progress: Callable[[int], None],
    stop_requested: Callable[[], bool],
) -> tuple[Any, PyTree]:
  """Trains, records and saves all runs of a setting, from its last checkpoint.

  Args:
    setting: The runs.
    history: A NamedTuple of host arrays to be filled; `losses` [R, num_steps]
      is among them.
    workdir: Where `metrics.jsonl` and `checkpoints/` go.
    on_progress: Told how many steps of single runs have been taken since.
    stop_requested: Whether to save and stop at the next evaluation.

  Returns:
    The history, and the final parameters, leaves [R, ...].

  Raises:
    UserError: If a run diverges, or the checkpoints are of another config.
    Stopped: If asked to stop; the state has been saved.
  """
  steps, layout, name = setting.evaluation_steps, setting.layout, setting.name
  with checkpoint.Checkpointer(workdir / "checkpoints" / name) as checkpointer:
    start, state, history = _restore(checkpointer, setting, history)
    on_progress(start * layout.num_members)
    with _metric_stream(workdir, setting.tags, start) as stream:
      while start < setting.num_steps:
        evaluation = int(np.searchsorted(steps, start, side="right"))
        end = int(steps[evaluation])
        state, losses, seen = setting.advance(state, start, end)
        losses, (before, after) = layout.gather((losses, seen))
        history.losses[:, start:end] = losses
        check_finite(setting, history.losses[:, :end], after, start)
        if start == 0:
          _write(stream, 0, setting.record(history, before, 0))
        rows = setting.record(history, after, evaluation)
        _write(stream, end, rows, history.losses[:, end - 1])
        on_progress((end - start) * layout.num_members)
        stop = preemption.on_any_process(stop_requested())
        if stop or _is_due(setting, start, end):
          saved = layout.to_save(state)
          losses = history.losses[:, :end]
          check_finite(setting, losses, saved.params, start)
          checkpointer.save(end, _to_save(saved, history))
        if stop:
          raise preemption.Stopped(f"{name} at step {end} of {steps[-1]}")
        start = end
    return history, layout.gather(state.params)


def check_finite(
    setting: Setting, losses: np.ndarray, values: PyTree, start: int
) -> None:
  """Refuses to go on with, or to save, runs that diverged.

  Args:
    setting: The runs.
    losses: So far, [R, end].
    values: What came of the interval from `start` to `end`, gathered or to be
      saved.
    start: First step of the interval.

  Raises:
    UserError: If a loss or a value is NaN or infinite.
  """
  is_good = np.isfinite(losses).all(axis=1) & setting.layout.is_finite(values)
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
      f"{setting.name} diverged between steps {start} and {losses.shape[1]},"
      f" with {setting.describe(r)}: its last finite loss is {last}. Metrics up"
      f" to step {start} and the checkpoints before are kept. Use a smaller"
      f" {setting.rates}, in a new workdir."
  )


def _metric_stream(workdir: pathlib.Path, tags: Mapping[str, Any], start: int):
  """The metric rows of a setting, which the main process writes."""
  if not devices.is_main_process():
    return contextlib.nullcontext()
  return metric_stream.MetricStream(
      workdir / "metrics.jsonl",
      resume_below=start + 1 if start else None,
      tags=tags,
  )


def _write(
    stream: metric_stream.MetricStream | None,
    step: int,
    rows: list[dict[str, Any]],
    losses: np.ndarray | None = None,
) -> None:
  if stream is None:
    return
  for r, row in enumerate(rows):
    stream.write(step, row if losses is None else row | {"loss": losses[r]})


def _to_save(state: Any, history: Any) -> dict[str, Any]:
  return {"state": state, "history": history._asdict()}


def _restore(
    checkpointer: checkpoint.Checkpointer, setting: Setting, history: Any
) -> tuple[int, Any, Any]:
  """Step, state and history of the last good checkpoint, or of the start."""
  layout = setting.layout
  template = layout.to_restore(jax.eval_shape(setting.init))
  restored = checkpointer.restore_latest(_to_save(template, history))
  if restored is None:
    return 0, setting.init(), history
  return (
      restored.step,
      layout.from_saved(restored.tree["state"]),
      type(history)(**restored.tree["history"]),
  )


def _is_due(setting: Setting, start: int, end: int) -> bool:
  """True if a checkpoint, or the last step, lies in (start, end]."""
  interval = setting.checkpoint_every
  return start // interval < end // interval or end == setting.num_steps
