"""Rows of measurements in a folder: a run that was cut goes on from them."""

from collections.abc import Mapping
import pathlib
from typing import Any

from scansnap_jax.experiment import json_file

_FILE = "rows.jsonl"


class SavedRows:
  """Rows of one file, each a JSON object in a line, added as they are measured.

  The folder's settings are those of the run (`experiment.workdir`), so that a
  row that is there is one that this run would measure.
  """

  def __init__(self, workdir: pathlib.Path | None, about: Mapping[str, Any]):
    """Reads what is there.

    Args:
      workdir: The run's folder; None keeps nothing.
      about: What all rows here have in common.
    """
    self._path = None if workdir is None else workdir / _FILE
    self._about = dict(about)
    self._rows = (
        [] if self._path is None else json_file.read_objects(self._path)
    )

  def find(self, **key: Any) -> dict[str, Any] | None:
    """Returns the row of these values, without them; None if there is none."""
    wanted = self._about | key
    for row in self._rows:
      if wanted.items() <= row.items():
        return {name: row[name] for name in row if name not in wanted}
    return None

  def add(self, row: Mapping[str, Any], **key: Any) -> None:
    """Keeps the row of these values."""
    whole = self._about | key | dict(row)
    self._rows.append(whole)
    if self._path is not None:
      json_file.append_object(self._path, whole)
