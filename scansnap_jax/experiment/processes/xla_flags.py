"""XLA_FLAGS that XLA does not take, told as any other mistake is.

XLA reads the variable once, deep within its first use, and ends the process
where a flag is unknown or its value is of another type.
"""

import os
import re
import warnings

from jax._src import xla_bridge
from jax._src.lib import xla_client

from scansnap_jax.experiment import errors

_NAME = "XLA_FLAGS"
# Severity, month and day, time, thread and place, as XLA logs.
_LOGGED = re.compile(r"^[EF]\d{4} \S+ +\d+ \S+\] ")
_MOST_BYTES = 2**20


def check() -> None:
  """Has a child read the flags, in milliseconds, before this process does.

  Raises:
    UserError: XLA does not take them.
  """
  given = os.environ.get(_NAME)
  if not given or xla_bridge.backends_are_initialized():
    return  # There are none, or XLA took them.
  told, end = os.pipe()
  with warnings.catch_warnings(action="ignore"):  # Of threads: it uses none.
    child = os.fork()
  if not child:
    _read_flags(end)
  os.close(end)
  with os.fdopen(told, errors="replace") as file:
    said = file.read(_MOST_BYTES)
  _, status = os.waitpid(child, 0)
  if status:
    raise errors.UserError(f"{_NAME}={given} cannot be used: {_reason(said)}")


def _read_flags(end: int) -> None:
  """Ends this process, as XLA would or with 0."""
  try:
    os.dup2(end, 2)
    xla_client.CompileOptions()
    os._exit(0)
  finally:
    os._exit(1)


def _reason(said: str) -> str:
  """The first line of what XLA said, without where in its code it was."""
  lines = [line for line in said.splitlines() if line.strip()]
  return _LOGGED.sub("", lines[0]) if lines else "XLA does not say why."
