"""Libraries that show a run while it runs, by their names.

  with tracker.shown(["tensorboard"], workdir, config):
    train.train_and_evaluate(config, workdir)

Each `metric_stream.MetricStream` that is opened meanwhile tells the trackers
its rows as it writes them, as a run of its own where several share a workdir.
The file stays what a run resumes from and reports are made of: a tracker is
never read.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import importlib
import pathlib
import re
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from scansnap_jax.experiment import errors

# The module of each name here, its library, and the extra that brings it.
_LIBRARIES = {
    "tensorboard": ("tensorboard_events", "tensorboardX", "log"),
    "wandb": ("weights_and_biases", "wandb", "wandb"),
}
NAMES = tuple(_LIBRARIES)


class _Shown(NamedTuple):
  names: Sequence[str] = ()
  workdir: pathlib.Path = pathlib.Path()
  config: Mapping[str, Any] = {}


_shown = _Shown()


@runtime_checkable
class Tracker(Protocol):
  """What is told of a run."""

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Shows numbers of a step, by their names."""
    ...

  def draw(self, step: int, name: str, image: np.ndarray) -> None:
    """Shows a picture [height, width], 0 black and 1 white."""
    ...

  def close(self) -> None:
    """Ends what is shown, whole."""
    ...


def check(names: Sequence[str]) -> None:
  """Raises UserError if a name is unknown, given twice or not installed."""
  for name in names:
    if name not in _LIBRARIES:
      raise errors.UserError(f"trackers={name} is none of {', '.join(NAMES)}.")
    library(name)
  if len({*names}) < len(names):
    raise errors.UserError(f"trackers={','.join(names)} has a name twice.")


def library(name: str) -> Any:
  """Imports and returns a tracker's library.

  Raises:
    UserError: It is not installed.
  """
  _, package, extra = _LIBRARIES[name]
  try:
    # Imported here: an extra that most runs do without.
    return importlib.import_module(package)
  except ImportError as error:
    raise errors.UserError(
        f"trackers={name} needs {package}: pip install 'scansnap-jax[{extra}]'"
    ) from error


@contextlib.contextmanager
def shown(
    names: Sequence[str], workdir: pathlib.Path, config: Mapping[str, Any]
) -> Iterator[None]:
  """Shows what is measured meanwhile, in this process, in trackers.

  Args:
    names: Which; none shows nothing.
    workdir: The run's, in which each keeps what it writes.
    config: Settings that are shown beside the numbers.

  Raises:
    UserError: As `check`.
  """
  global _shown
  check(names)
  before, _shown = _shown, _Shown(tuple(names), workdir, config)
  try:
    yield
  finally:
    _shown = before


def open_shown(
    folder: pathlib.Path, tags: Mapping[str, Any], resume_below: int
) -> list[Tracker]:
  """Opens the trackers that `shown` names, for one stream of rows.

  Args:
    folder: Of the stream's file.
    tags: What all its rows are about.
    resume_below: As `open_all`.

  Raises:
    UserError: As `open_all`.
  """
  names, workdir, config = _shown
  parts = [v if isinstance(v, str) else f"{n}={v}" for n, v in tags.items()]
  if folder.is_relative_to(workdir):
    parts = [*folder.relative_to(workdir).parts, *parts]
  stream = "/".join(re.sub(r"[^\w.=+-]+", "_", part) for part in parts)
  return open_all(names, workdir, config, resume_below, stream)


def open_all(
    names: Sequence[str],
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    resume_below: int,
    stream: str = "",
) -> list[Tracker]:
  """Opens the trackers of a run, which may have begun before.

  Args:
    names: Which.
    workdir: The run's, in which each keeps what it writes.
    config: Settings that are shown beside the numbers.
    resume_below: Rows from this step on will be written again.
    stream: Which of the run's series of steps, as `figure4/num_last=1`; empty
      where it has one alone. Each counts its steps for itself.

  Raises:
    UserError: A library is not installed or refuses to start.
  """
  found = []
  for name in names:
    module = importlib.import_module(f"{__package__}.{_LIBRARIES[name][0]}")
    options = (workdir, config, resume_below, stream)
    found.append(module.Tracker(library(name), *options))
  return found
