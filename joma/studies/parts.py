"""A study in parts, each kept when it is done, so that a stopped run goes on.

  def measure(config, part):
    rows = {name: part(name, lambda: train(config, name)) for name in ...}

A part is a mapping of numbers, lists and text: what JSON can hold. It lies in
parts/NAME.json with its checksum; one that is damaged is measured anew, which
gives the same numbers. SIGTERM and Ctrl-C end the run between two parts.
"""

from collections.abc import Callable
import json
import pathlib
import re
from typing import Any, Protocol, runtime_checkable
import zlib

from absl import logging

from joma.studies import claims
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import metric_stream
from scansnap_jax.experiment import report
from scansnap_jax.experiment import workdir as workdir_lib
from scansnap_jax.experiment.processes import preemption


@runtime_checkable
class Part(Protocol):
  """Measures a part of a study, or takes it from the workdir."""

  def __call__(
      self, name: str, measure: Callable[[], dict[str, Any]]
  ) -> dict[str, Any]:
    """Returns what `measure` does, as JSON gives it back.

    Args:
      name: Of the part, unlike all others of the study.
      measure: Returns numbers. What its "curves", by name, and "steps" hold
        goes to metrics.jsonl, a row a step.

    Raises:
      UserError: A number is NaN or infinite.
      Stopped: The run was asked to stop, before this part.
    """
    ...


def at_once(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """The `Part` of a study without a workdir."""
  found = measure()
  claims.require_finite(name, found)
  return report.to_json(found)


def measure(
    name: str,
    measure: Callable[..., dict[str, Any]],
    config: Any,
    workdir: pathlib.Path,
) -> dict[str, Any]:
  """Measures a study whose parts are kept in the run's folder.

  Args:
    name: Of the study, which tags its rows in metrics.jsonl.
    measure: Takes the settings and a `Part`.
    config: The settings.
    workdir: The run's folder.

  Raises:
    UserError: As `Part`, or a file cannot be written.
    Stopped: The run was asked to stop.
  """
  folder = workdir / "parts"
  workdir_lib.make_folder(folder)
  experiment = name
  with preemption.stop_requests() as asked:

    def part(
        name: str, measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
      path = folder / f"{_file_name(name)}.json"
      found = _read(path)
      if found is None:
        if asked():
          raise preemption.Stopped(f"front of {name}")
        found = at_once(name, measure)
        _write(path, found)
      tags = {"experiment": experiment, "part": name}
      _stream(workdir / "metrics.jsonl", tags, found)
      return found

    return measure(config, part=part)


def _file_name(name: str) -> str:
  """A name that every file system takes; unlike names stay unlike."""
  return (
      f"{re.sub('[^a-z0-9]+', '_', name.lower())}.{zlib.crc32(name.encode())}"
  )


def _write(path: pathlib.Path, found: dict[str, Any]) -> None:
  text = json.dumps(found, allow_nan=False)
  held = {"crc32": zlib.crc32(text.encode()), "part": found}
  workdir_lib.write_atomic(path, json.dumps(held, allow_nan=False) + "\n")


def _read(path: pathlib.Path) -> dict[str, Any] | None:
  """What a file holds; None where there is none, or it is damaged."""
  if not path.exists():
    return None
  try:
    held = json_file.read_object(path)
    found = held["part"]
    if zlib.crc32(json.dumps(found).encode()) == held["crc32"]:
      return found
  except (errors.UserError, KeyError):
    pass
  logging.warning("%s is damaged; the part is measured anew.", path)
  return None


def _stream(
    path: pathlib.Path, tags: dict[str, str], found: dict[str, Any]
) -> None:
  """Writes the rows of a part, whose steps are its own."""
  curves, steps = found.get("curves", {}), found.get("steps", ())
  if not steps:
    return
  with metric_stream.MetricStream(path, resume_below=None, tags=tags) as rows:
    for i, step in enumerate(steps):
      rows.write(step, {curve: value[i] for curve, value in curves.items()})
