"""Variables of the environment that libraries read, whatever is in them.

jax refuses a variable of its own while it is imported, which scripts do before
anything can catch it; matplotlib does so with MPLBACKEND, which no figure here
has a use for, and with SOURCE_DATE_EPOCH after all work is done.
"""

import contextlib
import os
import sys
import types

from scansnap_jax.experiment import errors

_STATUS = 2
_READER = os.path.join("jax", "_src", "config.py")
_LAST_SECOND = 253402300799  # Of the year 9999, the last that a date can have.
_DATE = "SOURCE_DATE_EPOCH"


def settle() -> None:
  """Leaves out what has no effect, and has jax's refusals be one line."""
  os.environ.pop("MPLBACKEND", None)  # Figures are built without a backend.
  sys.excepthook = _tell


def check() -> None:
  """Raises UserError where a variable would be refused at the end of a run."""
  given = os.environ.get(_DATE)
  if given is None:
    return
  with contextlib.suppress(ValueError):
    if 0 <= int(given) <= _LAST_SECOND:
      return
  raise errors.UserError(
      f"{_DATE}={given} must be seconds since 1970, from 0 to {_LAST_SECOND}:"
      " figures have it as their date."
  )


def _tell(
    kind: type[BaseException],
    error: BaseException,
    trace: types.TracebackType | None,
) -> None:
  """Shows what nobody caught: in one line where it is jax's refusal."""
  if kind is not ValueError or not _is_of_jax(trace):
    sys.__excepthook__(kind, error, trace)
    return
  told = " ".join(str(error).split())
  with contextlib.suppress(OSError, AttributeError):  # A stream may be closed.
    print(
        f"error: a variable of the environment is none that jax takes: {told}",
        file=sys.stderr,
        flush=True,
    )
  os._exit(_STATUS)  # The interpreter would end with 1.


def _is_of_jax(trace: types.TracebackType | None) -> bool:
  """Whether an error arose where jax reads its variables."""
  if trace is None:
    return False
  while trace.tb_next is not None:
    trace = trace.tb_next
  return trace.tb_frame.f_code.co_filename.endswith(_READER)
