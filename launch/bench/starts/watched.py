"""A process whose output goes into pipes, and the times of its lines."""

from collections.abc import Mapping, Sequence
import itertools
import os
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple

from scansnap_jax.experiment import errors


class Start(NamedTuple):
  """How one start went.

  Attributes:
    seconds: By the clock, imports and the interpreter's end included.
    cpu_seconds: Of all its threads.
    silence_s: The longest time without a byte on stdout or stderr.
    said: What it wrote, both streams as they came.
  """

  seconds: float
  cpu_seconds: float
  silence_s: float
  said: str


def start(
    arguments: Sequence[str],
    folder: pathlib.Path,
    env: Mapping[str, str],
) -> Start:
  """Runs `python` with arguments to its end.

  Raises:
    UserError: It failed; its last line is said again.
  """
  began = time.monotonic()
  process = subprocess.Popen(
      [sys.executable, *arguments],
      cwd=folder,
      env=env,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
  )
  assert process.stdout is not None
  times, parts = [began], []
  with process.stdout as stream:
    while part := os.read(stream.fileno(), 1 << 16):
      times.append(time.monotonic())
      parts.append(part)
  # Unlike the sum over all children, it is this child's alone.
  _, status, usage = os.wait4(process.pid, 0)
  times.append(time.monotonic())
  process.returncode = os.waitstatus_to_exitcode(status)
  said = b"".join(parts).decode(errors="replace")
  if process.returncode:
    last = (said.strip().splitlines() or ["it said nothing"])[-1]
    raise errors.UserError(
        f"python {' '.join(arguments)} ended with {process.returncode}:"
        f" {last.removeprefix('error: ')}"
    )
  return Start(
      seconds=times[-1] - began,
      cpu_seconds=usage.ru_utime + usage.ru_stime,
      silence_s=max(b - a for a, b in itertools.pairwise(times)),
      said=said,
  )
