"""Failures of the compilers for want of memory, as exceptions with figures."""

from collections.abc import Iterator
import contextlib
import re

import jax

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
# What one allocation asks for; what all do, or all in scoped VMEM; a GPU block.
_ALLOCATION = re.compile(
    r"Allocation \(size=(?P<used>\d+)\) would exceed memory"
    r" \(size=(?P<limit>\d+)\).*?space=(?P<space>\w+)",
    re.DOTALL,
)
_PROGRAM = re.compile(
    r"in memory space (?P<space>\w+).*?(?: of |and limit )"
    r"(?P<limit>[\d.]+[KMG]?)\b.*?xceeded[^.\n]* by (?P<excess>[\d.]+[KMG]?)",
    re.DOTALL,
)
# Found before the program is laid out.
_NEEDED = re.compile(
    r"total memory required for [^(]*\((?P<used>[\d.]+[KMG]?)\) exceeds"
    r" available (?P<space>\w+) \((?P<limit>[\d.]+[KMG]?)\)"
)
_GPU_BLOCK = re.compile(
    r"(?P<space>smem)_bytes=(?P<used>\d+) > max_smem_bytes=(?P<limit>\d+)"
)


class OutOfMemory(ValueError):
  """The program does not fit.

  Attributes:
    used_bytes: What it takes, as precisely as the compiler says.
    limit_bytes: What there is.
  """

  def __init__(self, message: str, used_bytes: int, limit_bytes: int):
    super().__init__(message)
    self.used_bytes = used_bytes
    self.limit_bytes = limit_bytes


class OutOfVmem(OutOfMemory):
  """The blocks and scratch of a kernel do not fit in VMEM."""


class OutOfSmem(OutOfMemory):
  """Scalars do not fit in SMEM, or GPU blocks in shared memory."""


class OutOfHbm(OutOfMemory):
  """The arrays of the program do not fit in the memory of the device."""


_ERRORS = {"vmem": OutOfVmem, "smem": OutOfSmem, "hbm": OutOfHbm}


def parse(message: str) -> OutOfMemory | None:
  """Makes an exception of a compiler's message, if that is what it says."""
  for pattern in (_ALLOCATION, _PROGRAM, _NEEDED, _GPU_BLOCK):
    if match := pattern.search(message):
      break
  else:
    return None
  groups = match.groupdict()
  limit = _bytes(groups["limit"])
  # Some messages give what is asked for, others how far it is past the limit.
  excess = groups.get("excess")
  used = limit + _bytes(excess) if excess else _bytes(groups["used"])
  space = groups["space"].lower()
  return _ERRORS.get(space, OutOfMemory)(
      f"{space} overflows: {used:,} bytes of {limit:,}", used, limit
  )


@contextlib.contextmanager
def explained() -> Iterator[None]:
  """Raises a compiler's failure for want of memory as an OutOfMemory."""
  try:
    yield
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    if explanation := parse(str(error)):
      raise explanation from error
    raise


def _bytes(text: str) -> int:
  return round(float(text.rstrip("KMG")) * _UNITS.get(text[-1], 1))
