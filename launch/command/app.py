"""Start of every script: parses flags, calls main, shows errors in one line.

if __name__ == "__main__":
  app.run(main)
"""

from collections.abc import Callable, Iterable
import contextlib
import difflib
import errno
import io
import logging
import os
import re
import signal
import sys
from typing import TYPE_CHECKING

from absl import app
from absl import flags

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import progress
from scansnap_jax.experiment.processes import compilation_cache
from scansnap_jax.experiment.processes import interrupts
from scansnap_jax.experiment.processes import variables

if TYPE_CHECKING:
  from typing_extensions import Buffer  # typing has it from Python 3.12 on.

flags.disclaim_key_flags()

_BROKEN_PIPE = 128 + signal.SIGPIPE
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
# What is wrong with a file or its disk, never with the program.
_OF_FILES = (
    *_FULL,
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ESTALE),
)
# What the system lets no process of this user have more of.
_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_EXHAUSTED = re.compile("(?:RESOURCE_EXHAUSTED: |(?=Out of memory ))(.*)")


def run(
    main: Callable[[list[str]], int | None], *, keeps_compiled: bool = True
) -> None:
  """Parses the command line and exits with what `main` returns.

  A flag that does not parse, a leftover argument or a `UserError` becomes
  `error: <message>` on stderr and exit status 2; so does a file or stdout that
  takes no more (a full disk, a folder that is gone), and what no memory holds.
  A reader of stdout that went away (`| head`) ends the script quietly with 141,
  as a shell reports SIGPIPE. Any other exception keeps its traceback.

  Args:
    main: The script. It takes argv, of which only the program name is left,
      and returns an exit status (None is 0).
    keeps_compiled: Whether programs are kept for the next start, where
      --compilation_cache says. Benchmarks compile anew.
  """
  interrupts.install()
  variables.settle()
  _prepare_streams()
  if keeps_compiled:
    _define_compilation_cache()

  def guarded(argv: list[str]) -> int | None:
    # absl shows what every library logs at INFO: fonts subset, TPUs not found.
    for library in ("fontTools", "jax", "matplotlib", "orbax"):
      logging.getLogger(library).setLevel(logging.WARNING)
    try:
      if argv[1:]:
        raise errors.UserError(
            f"unexpected {argv[1:]}; flags are written --name=value"
        )
      variables.check()
      if keeps_compiled:
        _keep_compiled()
      with progress.watch():
        status = main(argv)
      sys.stdout.flush()
      return status
    except errors.UserError as error:
      return _complain(str(error))
    except OSError as error:
      return _status_of(error)
    except (MemoryError, RuntimeError) as error:
      told = " ".join(str(error).split())
      # jax's own error, which has no public name before jax is imported.
      found = _EXHAUSTED.search(told)
      if isinstance(error, RuntimeError):
        if found is None:
          raise
        told = found[1]
      return _complain(
          f"there is not enough memory ({told or 'none is left'}). Use smaller"
          " sizes."
      )

  app.run(guarded, flags_parser=_parse)


def _status_of(error: OSError) -> int:
  """Says what is wrong with a file or stdout; raises what is neither's."""
  if isinstance(error, BrokenPipeError):
    _drop_stdout()
    return _BROKEN_PIPE
  if error.filename is not None and error.errno in _OF_FILES:
    return _complain(f"{error.filename}: {error.strerror}.")
  if error.errno in _LIMITS:
    return _complain(
        f"the system gives this process no more: {error.strerror}. Raise its"
        " limits (ulimit -a), or use smaller sizes."
    )
  if error.errno not in _FULL:
    raise error
  _drop_stdout()
  return _complain(f"stdout cannot be written: {error.strerror}")


def _define_compilation_cache() -> None:
  flags.DEFINE_string(
      "compilation_cache",
      None,
      "Folder that keeps compiled programs, which makes the next start quick;"
      " or off. By default one of this processor below ~/.cache/scansnap_jax.",
  )


def _keep_compiled() -> None:
  trouble = compilation_cache.use(flags.FLAGS.compilation_cache)
  if trouble is not None:
    print(f"warning: {trouble}", file=sys.stderr)


def _prepare_streams() -> None:
  """Gives output that was closed (`2>&-`) a place where nothing is kept.

  Otherwise `print(file=sys.stderr)` would write to stdout, and the next file
  that is opened would be taken for the stream. What a stream's encoding lacks
  (a plus-minus sign where LC_ALL=C) is escaped, as stderr has it.
  """
  for name in ("stdout", "stderr"):
    if getattr(sys, name) is None:
      setattr(sys, name, open(os.devnull, "w"))  # For the process's whole life.
  if sys.stderr is sys.__stderr__:  # Else whoever calls has a place for it.
    sys.stderr = _remarks()
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")


class _Remarks(io.FileIO):
  """Standard error, where what cannot be written is dropped."""

  def write(self, data: "Buffer", /) -> int:
    """Writes what the stream takes; a remark never ends or fails a run."""
    try:
      return super().write(data) or 0
    except OSError:
      return memoryview(data).nbytes


def _remarks() -> io.TextIOWrapper:
  return io.TextIOWrapper(
      io.BufferedWriter(_Remarks(2, "w", closefd=False)),
      encoding=sys.stderr.encoding,
      errors="backslashreplace",
      line_buffering=True,
  )


def _drop_stdout() -> None:
  """Lets the interpreter end without writing what is left of stdout."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def suggest(name: str, known: Iterable[str]) -> str | None:
  """Returns the known flag that `name` most likely stands for, or None.

  A dotted flag is also found by its last part: `learning_rate` suggests
  `optimizer.learning_rate`.
  """
  whole = list(known)
  by_last_part = {flag.rpartition(".")[2]: flag for flag in reversed(whole)}
  for candidates in ({flag: flag for flag in whole}, by_last_part):
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.7)
    if close:
      return candidates[close[0]]
  return None


def _parse(argv: list[str]) -> list[str]:
  try:
    try:
      return flags.FLAGS(argv)
    except SystemExit:  # --help has written. absl would end with 1.
      sys.stdout.flush()
      status = 0
  except OSError as error:
    status = _status_of(error)
  except flags.UnrecognizedFlagError as error:
    name = suggest(error.flagname, flags.FLAGS)
    hint = f"did you mean --{name}?" if name else "--help lists them"
    status = _complain(f"unknown flag --{error.flagname}; {hint}")
  except (flags.Error, ValueError) as error:  # absl raises both.
    status = _complain(str(error).removeprefix("ERROR:: "))
  sys.exit(status)


def _complain(message: str) -> int:
  # One line, though a flag's value may have several.
  with contextlib.suppress(OSError):
    print("error: " + " ".join(message.splitlines()), file=sys.stderr)
  return 2
