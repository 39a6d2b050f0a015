"""Where jax keeps what it has compiled, so that a second start is quick.

jax reads its settings from the environment when it is imported: `use` comes
before that. Nothing here imports it.
"""

from collections.abc import Mapping
import hashlib
from importlib import metadata
import os
import pathlib
import platform
import sys
import warnings

from scansnap_jax.experiment import json_file

_FOLDER = "JAX_COMPILATION_CACHE_DIR"
_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
# A program that takes less is compiled again sooner than it is read.
_LEAST_SECONDS = "0.1"
# jax complains of each program that cannot be read or written; it compiles it
# again, and a full disk has been told of by what it cost.
_COMPLAINT = "Error (reading|writing) persistent compilation cache entry"


def use(asked: str | None) -> str | None:
  """Has jax keep what it compiles.

  Where the environment names a folder already, that is left as it is.

  Args:
    asked: A folder; `off` is none; None is one of this machine's processor and
      this version of jax below $XDG_CACHE_HOME, or ~/.cache.

  Returns:
    Why nothing is kept, in a sentence, where something was to be; else None.
  """
  if asked == "off":
    os.environ.pop(_FOLDER, None)
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    return None
  if asked is None and os.environ.get(_FOLDER):
    return None
  folder = json_file.local_path(asked) if asked else default(os.environ)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
      raise PermissionError(None, "Permission denied")
  except (OSError, ValueError) as error:
    reason = getattr(error, "strerror", None) or str(error)
    return f"what is compiled is not kept: {folder}: {reason}"
  os.environ[_FOLDER] = str(folder.absolute())
  os.environ.setdefault(_SECONDS, _LEAST_SECONDS)
  warnings.filterwarnings("ignore", message=_COMPLAINT)
  return None


def default(environ: Mapping[str, str]) -> pathlib.Path:
  """The folder of this processor and version.

  A program is machine code for the processor that compiled it: a home folder
  that machines share must not hand it to one that lacks its instructions.
  """
  cache = environ.get("XDG_CACHE_HOME")
  # The convention has relative paths ignored.
  if not cache or not os.path.isabs(cache):
    cache = os.path.join(os.path.expanduser("~"), ".cache")
  about = "\n".join([
      platform.machine(),
      _instructions(),
      sys.version,
      metadata.version("jax"),
      metadata.version("jaxlib"),
  ])
  name = hashlib.sha256(about.encode()).hexdigest()[:16]
  return pathlib.Path(cache) / "scansnap_jax" / "compiled" / name


def _instructions() -> str:
  """What Linux says that the processor can do; elsewhere nothing."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return ""
  # x86 calls them flags, ARM features.
  return next((s for s in lines if s.startswith(("flags", "Features"))), "")
