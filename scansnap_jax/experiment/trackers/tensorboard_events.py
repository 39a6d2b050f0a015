"""TensorBoard's event files, by tensorboardX."""

from collections.abc import Mapping
import pathlib
from typing import Any

import numpy as np


class Tracker:
  """A `tracker.Tracker` that writes to `tensorboard/STREAM` of a workdir."""

  def __init__(
      self,
      tensorboard: Any,
      workdir: pathlib.Path,
      config: Mapping[str, Any],
      resume_below: int,
      stream: str,
  ):
    """Opens a file; TensorBoard hides what others hold from that step on.

    It does so per folder: streams that shared one would hide each other.
    """
    del config  # Its page has no place for settings of one run.
    self._writer = tensorboard.SummaryWriter(
        str(workdir / "tensorboard" / stream), purge_step=resume_below
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds a point to the curve of each name."""
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def draw(self, step: int, name: str, image: np.ndarray) -> None:
    """Adds a picture."""
    self._writer.add_image(name, image, step, dataformats="HW")

  def close(self) -> None:
    """Closes the file."""
    self._writer.close()
