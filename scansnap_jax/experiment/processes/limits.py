"""How much memory the system lets this process have.

That of the machine is not what a process gets. A container or a job of a
cluster has a limit (a control group), beyond which the kernel ends it by
SIGKILL without a word; a shell may set one of addresses (`ulimit -v`), under
which libraries cannot be mapped and threads cannot start, which ends in dumps.
Imports no jax.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import resource
import sys

_STATUS = 2
# jax, orbax and matplotlib are mapped, and two cores' threads are started.
_LEAST_ADDRESSES = 5 << 29
_GROUPS = pathlib.Path("/sys/fs/cgroup")
_OWN_GROUPS = pathlib.Path("/proc/self/cgroup")


def settle() -> None:
  """Ends in one line where `ulimit -v` leaves too little to start at all."""
  least, has = _LEAST_ADDRESSES, _addresses()
  if has is None or has >= least:
    return
  with contextlib.suppress(OSError, AttributeError):  # A stream may be closed.
    print(
        f"error: `ulimit -v` lets a process have {has / 2**30:.1f} GiB of"
        f" addresses; at least {least / 2**30} GiB are needed to start.",
        file=sys.stderr,
        flush=True,
    )
  os._exit(_STATUS)


def memory(
    groups: pathlib.Path = _GROUPS, own: pathlib.Path = _OWN_GROUPS
) -> tuple[int, str]:
  """Returns the least limit that holds here, and whose it is.

  Args:
    groups: Where Linux shows the control groups, of version 1 or 2.
    own: Names those of a process.

  Returns:
    Bytes, and the beginning of a sentence that ends with them.
  """
  pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  found = [(pages, "this machine has")]
  found += [(n, "this container or job has") for n in _of_groups(groups, own)]
  addresses = _addresses()
  if addresses is not None:
    found.append((addresses, "`ulimit -v` lets a process have"))
  return min(found)


def _addresses() -> int | None:
  soft, _ = resource.getrlimit(resource.RLIMIT_AS)
  return None if soft == resource.RLIM_INFINITY else soft


def _of_groups(groups: pathlib.Path, own: pathlib.Path) -> Iterator[int]:
  """Limits of the groups that a process is in, and of those that hold them.

  In a container a group's own name may not be there; the outermost is then its
  own.
  """
  with contextlib.suppress(OSError, ValueError):
    for line in own.read_text().splitlines():
      _, controllers, name = line.split(":", 2)
      if controllers and "memory" not in controllers.split(","):
        continue
      root = groups / "memory" if controllers else groups
      limit = "memory.limit_in_bytes" if controllers else "memory.max"
      place = pathlib.PurePath(name.lstrip("/"))
      for group in (place, *place.parents):
        with contextlib.suppress(OSError, ValueError):  # "max" is none.
          yield int((root / group / limit).read_text())
