"""Libraries that show a run while it runs, by their names.

A tracker is given the rows of `metrics.jsonl` as they are written. The file
stays what a run resumes from and reports are made of: a tracker is never read.
"""

from collections.abc import Mapping, Sequence
import importlib
import pathlib
from typing import Any, Protocol, runtime_checkable

import numpy as np

from scansnap_jax.experiment import errors

# The module of each name here, its library, and the extra that brings it.
_LIBRARIES = {
    "tensorboard": ("tensorboard_events", "tensorboardX", "log"),
    "wandb": ("weights_and_biases", "wandb", "wandb"),
}
NAMES = tuple(_LIBRARIES)


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


def open_all(
    names: Sequence[str],
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    resume_below: int,
) -> list[Tracker]:
  """Opens the trackers of a run, which may have begun before.

  Args:
    names: Which.
    workdir: The run's, in which each keeps what it writes.
    config: Settings that are shown beside the numbers.
    resume_below: Rows from this step on will be written again.

  Raises:
    UserError: A library is not installed or refuses to start.
  """
  found = []
  for name in names:
    module = importlib.import_module(f"{__package__}.{_LIBRARIES[name][0]}")
    found.append(module.Tracker(library(name), workdir, config, resume_below))
  return found
