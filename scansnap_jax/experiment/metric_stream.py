"""The measurements of a run, one JSON object a line.

  {"step": 40, "experiment": "fast", "loss": 0.25, "recall": 1.0}

Every line is valid JSON and is flushed as it is written. A resumed run first
drops the rows that it will write again, so that the file never holds a step
twice.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
import contextlib
import errno
import json
import math
import operator
import os
import pathlib
from typing import Any, SupportsIndex

from absl import logging
import numpy as np

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import workdir
from scansnap_jax.experiment.trackers import tracker


class MetricStream:
  """Appends rows to a JSONL file, and tells trackers where asked."""

  def __init__(
      self,
      path: str | os.PathLike[str],
      *,
      resume_below: int | None,
      tags: Mapping[str, Any] | None = None,
      trackers: Sequence[tracker.Tracker] | None = None,
  ):
    """Opens the file, created with its folder if need be.

    Of several processes one should do so.

    Args:
      path: The JSONL file.
      resume_below: Keep the rows of earlier steps than this one, that is of the
        steps that a restored checkpoint has behind it. None starts afresh.
      tags: What all rows of this stream are about, such as
        `{"experiment": "fast"}`. Several streams may share a file: the rows of
        other tags are kept, whatever their step.
      trackers: Are told of each row, and closed with the stream; None are those
        that `tracker.shown` names.

    Raises:
      UserError: The path is no file that may be written, or a tracker refuses
        to start.
    """
    self._path = pathlib.Path(path)
    workdir.make_folder(self._path.parent)
    if os.path.lexists(self._path):
      json_file.check_regular(self._path)
    below = -math.inf if resume_below is None else resume_below
    self._tags = dict(tags or {})
    # Rows behind the restored step are written again by this run: left in, each
    # of its steps would stand there twice.
    kept = [
        line
        for line, row in _lines(self._path)
        if row["step"] < below or not self._tags.items() <= row.items()
    ]
    workdir.write_atomic(self._path, "".join(line + "\n" for line in kept))
    try:
      self._file = open(self._path, "a", encoding="utf-8")
    except OSError as error:
      raise errors.UserError(
          f"{self._path} cannot be written: {error.strerror}."
      ) from error
    if trackers is None:
      first = resume_below or 0
      trackers = tracker.open_shown(self._path.parent, self._tags, first)
    self._trackers = tuple(trackers)

  def write(
      self, step: SupportsIndex, values: Mapping[str, Any], **tags: str | int
  ) -> None:
    """Appends one row.

    Args:
      step: Which step the values are of.
      values: Name to number: Python, numpy or jax, of a single element. NaN and
        infinities become null, which JSON has.
      **tags: What else the row is about, such as `experiment="fast"`.

    Raises:
      UserError: The file cannot be written, for one as the disk is full.
      ValueError: A value has several elements, or a name occurs twice.
    """
    scalars = self._append(step, values, tags)
    prefix = "".join(f"{tag}/" for tag in tags.values())
    self._tell(step, {prefix + n: v for n, v in scalars.items()})

  def write_runs(
      self,
      step: SupportsIndex,
      rows: Sequence[Mapping[str, Any]],
      settings: Collection[str],
  ) -> None:
    """Appends a row for each of several runs; trackers are told the means.

    Hundreds of runs would be hundreds of curves. A mean is over the runs in
    which the value is a finite number.

    Args:
      step: Which step the values are of.
      rows: As the values of `write`.
      settings: Names in the rows that tell runs apart: they have no mean.

    Raises:
      UserError: As `write`.
      ValueError: As `write`.
    """
    told: dict[str, list[float]] = {}
    for row in rows:
      for name, value in self._append(step, row, {}).items():
        if value is not None and name not in settings:
          told.setdefault(name, []).append(value)
    self._tell(step, {n: sum(v) / len(v) for n, v in told.items()})

  def _append(
      self,
      step: SupportsIndex,
      values: Mapping[str, Any],
      tags: Mapping[str, str | int],
  ) -> dict[str, bool | int | float | None]:
    """Writes a row to the file; returns its numbers."""
    tags = {**self._tags, **tags}
    if {"step", *tags} & set(values):
      raise ValueError(f"names occur twice: {sorted(values)}, {sorted(tags)}")
    scalars = {name: _scalar(name, value) for name, value in values.items()}
    row = {"step": operator.index(step), **tags, **scalars}
    try:
      self._file.write(json.dumps(row, allow_nan=False) + "\n")
      # Row by row: who watches a run, or kills it, sees what was measured.
      self._file.flush()
      if not os.fstat(self._file.fileno()).st_nlink:
        # Writing goes on, to a file that nobody finds.
        raise FileNotFoundError(errno.ENOENT, "it was removed")
    except OSError as error:
      raise errors.UserError(
          f"{self._path} cannot be written: {error.strerror or error}."
      ) from error
    return scalars

  def _tell(self, step: SupportsIndex, values: Mapping[str, Any]) -> None:
    shown = {n: v for n, v in values.items() if v is not None}
    for each in self._trackers:
      each.write(operator.index(step), shown)

  def draw(self, step: SupportsIndex, name: str, image: np.ndarray) -> None:
    """Shows a picture in the trackers.

    Args:
      step: Of the run.
      name: Of the picture.
      image: [height, width], 0 is black and 1 white.
    """
    for each in self._trackers:
      each.draw(operator.index(step), name, image)

  def close(self) -> None:
    """Closes the file and the trackers."""
    with contextlib.suppress(OSError):  # What it could not write was told.
      self._file.close()
    for each in self._trackers:
      each.close()

  def __enter__(self) -> "MetricStream":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Returns the rows of a JSONL file, in the order they were written.

  A last line that a kill cut short is left out, and so is, with a warning, any
  other line that is no row. A file that does not exist has no rows.
  """
  return [row for _, row in _lines(pathlib.Path(path))]


def _lines(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields the text and the content of every row."""
  if not path.exists():
    return
  json_file.check_regular(path)
  lines = path.read_bytes().split(b"\n")
  for number, line in enumerate(lines, start=1):
    try:
      text = line.decode()
      row = json.loads(text)
      row["step"] + 0  # A row is an object with a step that is a number.
    except (ValueError, TypeError, KeyError, RecursionError):
      if line and number < len(lines):
        logging.warning("%s: line %d is no row; left out.", path, number)
      continue
    yield text, row


def _scalar(name: str, value: Any) -> bool | int | float | None:
  if getattr(value, "size", 1) != 1 or isinstance(value, str):
    raise ValueError(f"{name} is not one number: {value!r}")
  number = value.item() if hasattr(value, "item") else value
  if isinstance(number, (bool, int)):
    return number
  return float(number) if math.isfinite(number) else None
