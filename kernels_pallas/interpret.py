"""Runs the Pallas kernels interpreted, on any platform; for tests.

  with interpret.interpreted():
    attention(..., implementation="pallas_tpu")

Interpretation shows values, not speed. The mode is read while a program is
traced, so enter it before the first call of a jitted function.
"""

from collections.abc import Iterator
import contextlib
import contextvars
from typing import Any, TypeAlias

# What `pl.pallas_call` takes as `interpret`: a truth, or parameters of a
# simulated chip.
Mode: TypeAlias = Any

_MODE: contextvars.ContextVar[Mode] = contextvars.ContextVar(
    "interpret", default=False
)


@contextlib.contextmanager
def interpreted(mode: Mode = True) -> Iterator[None]:
  """Interprets every kernel that is traced inside.

  Args:
    mode: True turns kernels into XLA loops: fast, but out-of-range reads are
      clamped. `pltpu.InterpretParams(detect_races=True)` simulates the memory
      of a TPU: about 50 ms a grid step, finds races and wrong addresses.
  """
  token = _MODE.set(mode)
  try:
    yield
  finally:
    _MODE.reset(token)


def mode() -> Mode:
  """What `pl.pallas_call` takes as `interpret`; False outside `interpreted`."""
  return _MODE.get()
