"""A run of Weights & Biases, by wandb.

Its own variables hold: WANDB_MODE (`offline` writes below the workdir alone,
for `wandb sync`), WANDB_PROJECT, WANDB_ENTITY, WANDB_API_KEY and the others.
"""

from collections.abc import Mapping
import os
import pathlib
import secrets
from typing import Any

import numpy as np

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import workdir as workdir_lib

_PROJECT = "scansnap-jax"


class Tracker:
  """A `tracker.Tracker` that is one run there, also when it is resumed.

  Streams of a workdir are runs of one group: a run's steps never go back.
  """

  def __init__(
      self,
      wandb: Any,
      workdir: pathlib.Path,
      config: Mapping[str, Any],
      resume_below: int,
      stream: str,
  ):
    """Begins the run, or goes on with it.

    Raises:
      UserError: If wandb refuses, for one as nobody has logged in.
    """
    # Rows that it has, it drops when they come again; these are the same.
    del resume_below
    self._wandb = wandb
    try:
      self._run = wandb.init(
          project=os.environ.get("WANDB_PROJECT", _PROJECT),
          dir=str(workdir),
          name="/".join([workdir.name, *stream.split("/")]).rstrip("/"),
          group=workdir.name if stream else None,
          id=_id_of(workdir / "wandb" / stream),
          resume="allow",
          config=dict(config),
          # What a run prints is its own; so is the way it prints.
          settings=wandb.Settings(console="off", silent=True),
      )
    except (wandb.errors.Error, OSError) as error:
      first = (str(error).strip() or type(error).__name__).splitlines()[0]
      raise errors.UserError(
          f"Weights & Biases does not start ({first.rstrip('.')}): log in by"
          " `wandb login`, or set WANDB_MODE=offline."
      ) from error

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Logs the numbers of a step."""
    self._run.log(dict(values), step=step)

  def draw(self, step: int, name: str, image: np.ndarray) -> None:
    """Logs a picture."""
    pixels = np.round(255 * np.clip(image, 0.0, 1.0)).astype(np.uint8)
    self._run.log({name: self._wandb.Image(pixels)}, step=step)

  def close(self) -> None:
    """Ends the run; what is left is sent first."""
    self._run.finish()


def _id_of(folder: pathlib.Path) -> str:
  """The run's name for all times, kept in the folder."""
  path = folder / "run_id"
  if path.is_file():
    return path.read_text().strip()
  workdir_lib.make_folder(path.parent)
  name = secrets.token_hex(4)
  workdir_lib.write_atomic(path, name + "\n")
  return name
