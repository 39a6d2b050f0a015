"""The flag of scripts that write the page of `launch.explore` as well."""

from collections.abc import Callable
import pathlib
from typing import Any

from absl import flags

flags.disclaim_key_flags()  # --help lists the flag under the script.

_NAME = "explore.html"


def define(text: str) -> flags.FlagHolder[bool]:
  """Defines --explore; the text says what the page shows."""
  return flags.DEFINE_boolean("explore", False, text)


def write(workdir: pathlib.Path, make: Callable[[], Any]) -> None:
  """Writes the page into the folder of a run.

  Args:
    workdir: The folder.
    make: Returns a `joma.inference.explore.view.View`.
  """
  make().write(workdir / _NAME)


def link() -> dict[str, str]:
  """Returns what the report says of it."""
  from scansnap_jax.experiment import report

  return {"token by token": report.Link(_NAME)}
