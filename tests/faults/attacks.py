"""What all suites of attacks share: how one is run, and what came of it."""

import collections
from collections.abc import Iterable, Mapping, Sequence
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

_ROOT = pathlib.Path(__file__).parents[2]
_GB = 2**30
# Libraries reserve far more than they use; what counts is `Ended.memory`.
_ADDRESSES = 16 * _GB
RIGHT, CLEAR, CUT = "right", "clear error", "still at work"
_TOLD_EVERY = 20
TRACEBACK, SILENT, HANG = "traceback", "silent", "hang"
OUTCOMES = (RIGHT, CLEAR, CUT, TRACEBACK, SILENT, HANG)
_TRACEBACK = re.compile(
    r"Traceback \(most recent|Fatal Python error|terminate called"
    r"|^[A-Z]\w*Error: ",
    re.MULTILINE,
)


class Ended(NamedTuple):
  """A script that was run to its end, or to that of its time.

  Attributes:
    status: Of the process; less than 0 is the signal that ended it.
    is_late: It was ended as it took too long by the clock.
    memory: The most that it held, in bytes.
    cpu_s: Seconds of all cores.
    out: What it wrote to stdout.
    err: What it wrote to stderr.
  """

  status: int
  is_late: bool
  memory: int
  cpu_s: float
  out: str
  err: str

  @property
  def last_line(self) -> str:
    """The last line of stderr: the error, where there is one."""
    return (self.err.strip().splitlines() or [""])[-1]

  @property
  def outcome(self) -> str:
    """What a user would call it; whether a result is right is not asked."""
    if self.is_late:
      return HANG
    if self.status == -signal.SIGXCPU:
      return CUT
    if self.status not in (0, 2) or _TRACEBACK.search(self.err):
      return TRACEBACK
    if self.status == 0:
      return RIGHT
    is_clear = self.last_line.startswith("error: ")
    return CLEAR if is_clear and self.err.count("\nerror: ") < 2 else TRACEBACK


class Zygote:
  """Scripts as children of one process that has imported everything."""

  def __init__(
      self,
      env: Mapping[str, str | None] | None = None,
      *,
      is_warm: bool = True,
  ):
    """Starts the process.

    Args:
      env: Variables that differ from this process's; None removes one.
      is_warm: Whether it imports everything; else it is there at once.
    """
    self._scratch = tempfile.TemporaryDirectory(prefix="attacks_")
    # Whoever runs the tests may want no buffers, which hide what is written
    # when a script ends.
    whole = {**os.environ, "PYTHONUNBUFFERED": None, **(env or {})}
    self._process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.zygote", *["--cold"][is_warm:]],
        env={k: v for k, v in whole.items() if v is not None},
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    self.threads = self._answer()["threads"]
    self._count = 0

  def start(
      self,
      module: str,
      argv: Iterable[str],
      *,
      cwd: pathlib.Path = _ROOT,
      env: Mapping[str, str | None] | None = None,
      cpu_s: int = 60,
      limits: Mapping[str, int] | None = None,
      streams: Mapping[str, str] | None = None,
      hooks: Sequence[str] = (),
  ) -> "Started":
    """Starts a script.

    Args:
      module: As `python -m` takes it.
      argv: Its arguments.
      cwd: Where it runs.
      env: Variables; those that jax reads when it is imported have no effect.
      cpu_s: Seconds of all cores after which it is ended.
      limits: More limits, by the last word of their name in `resource`.
      streams: Other ends of stdin, stdout and stderr; see `zygote`.
      hooks: `stops` lets a training loop stop at its first evaluation, as
        after SIGTERM; `flags` prints the script's flags in place of its work;
        `undrawn` leaves figures empty; `untimed` measures no bandwidth.
    """
    self._count += 1
    out, err = (
        pathlib.Path(self._scratch.name, f"{self._count}.{name}")
        for name in ("out", "err")
    )
    places = {"stdin": os.devnull, "stdout": str(out), "stderr": str(err)}
    order = {
        "module": module,
        "argv": list(argv),
        "cwd": str(cwd),
        "env": dict(env or {}),
        "limits": {"CPU": cpu_s, "AS": _ADDRESSES, **(limits or {})},
        "streams": places | dict(streams or {}),
        "hooks": list(hooks),
    }
    return Started(self, self._ask(order)["pid"], out, err)

  def start_processes(
      self, number: int, module: str, argv: Sequence[str], **options
  ) -> list["Started"]:
    """Starts so many processes of one run on this machine, in order.

    Args:
      number: Processes; more than one meet at a free port, as several hosts.
      module: As `start`.
      argv: Arguments of each.
      **options: Those of `start`, without `env`.
    """
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      port = probe.getsockname()[1]
    several = ["--multihost", "--multihost_timeout=60"] if number > 1 else []
    place = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(number),
    }
    return [
        self.start(
            module,
            [*argv, *several],
            env={**place, "JAX_PROCESS_ID": str(index)},
            **options,
        )
        for index in range(number)
    ]

  def attack(self, module: str, *argv: str, wall_s: float = 300, **options):
    """Runs a script to its end; `options` are those of `start`."""
    return self.start(module, argv, **options).end(wall_s)

  def wait(self, pid: int, wall_s: float) -> dict[str, Any]:
    """Waits for a child, which is ended where it takes longer."""
    return self._ask({"wait": pid, "wall_s": wall_s})

  def close(self) -> None:
    """Ends the process."""
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()
    self._scratch.cleanup()

  def __enter__(self) -> "Zygote":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
    self._process.stdin.write(json.dumps(order) + "\n")
    self._process.stdin.flush()
    return self._answer()

  def _answer(self) -> dict[str, Any]:
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError("the process that makes the attacks ended")
    return json.loads(line)


class Started(NamedTuple):
  """A script under way.

  Attributes:
    zygote: Its parent.
    pid: Of the process.
    out: The file of its stdout.
    err: The file of its stderr.
  """

  zygote: Zygote
  pid: int
  out: pathlib.Path
  err: pathlib.Path

  def kill(self, number: int = signal.SIGKILL) -> None:
    """Sends a signal, which may come too late."""
    with contextlib.suppress(ProcessLookupError):
      os.kill(self.pid, number)

  def end(self, wall_s: float = 120) -> Ended:
    """Waits for its end, for so long by the clock."""
    answer = self.zygote.wait(self.pid, wall_s)
    texts = [_take(path) for path in (self.out, self.err)]
    return Ended(**answer, out=texts[0], err=texts[1])


def is_gone(started: Started) -> bool:
  """Whether a process ended: what is not waited for yet is a zombie."""
  status = pathlib.Path(f"/proc/{started.pid}/stat")
  return not status.exists() or status.read_text().split()[2] == "Z"


def _take(path: pathlib.Path) -> str:
  if not path.exists():
    return ""
  text = path.read_bytes().decode(errors="replace")
  path.unlink()
  return text


class Tally:
  """What came of many attacks, and a table of it."""

  def __init__(self):
    self._counts = collections.defaultdict(collections.Counter)
    self.failures: list[str] = []
    self.memory = 0
    self.cpu_s = 0.0

  def add(
      self, kind: str, name: str, ended: Ended, outcome: str | None = None
  ) -> None:
    """Counts an attack.

    Args:
      kind: Row of the table.
      name: Says how to do it again.
      ended: What came of it.
      outcome: In place of `ended.outcome`, where more is known.
    """
    outcome = outcome or ended.outcome
    self._counts[kind][outcome] += 1
    self.memory = max(self.memory, ended.memory)
    self.cpu_s += ended.cpu_s
    if not self.tries % _TOLD_EVERY:
      print(f"{self.tries} attacks", flush=True)
    if outcome in (TRACEBACK, SILENT, HANG):
      tail = "\n    ".join(ended.err.strip().splitlines()[-6:])
      self.failures.append(
          f"{outcome}: {kind}: {name}: status {ended.status}\n    {tail}"
      )
      print(self.failures[-1], flush=True)  # Long before the table.

  @property
  def tries(self) -> int:
    """How many there were."""
    return sum(sum(row.values()) for row in self._counts.values())

  def table(self) -> str:
    """Markdown: a row a kind, and their sum."""
    total = sum(self._counts.values(), collections.Counter())
    shown = [o for o in OUTCOMES if o != CUT or total[CUT]]
    rows = [*sorted(self._counts.items()), ("all", total)]
    lines = [_row("kind", "tries", *shown), "|" + " --- |" * (2 + len(shown))]
    lines += [
        _row(kind, sum(row.values()), *(row[o] for o in shown))
        for kind, row in rows
    ]
    return "\n".join(lines)


def _row(*cells: object) -> str:
  return f"| {' | '.join(map(str, cells))} |"


def report(tally: Tally, title: str) -> str:
  """Prints the table; returns what is wrong, empty where nothing is."""
  print(f"\n{title}\n\n{tally.table()}\n")
  print(f"Most memory of one: {tally.memory / _GB:.2f} GiB.")
  print(f"Seconds of all cores: {tally.cpu_s:.0f}.")
  return "\n".join(tally.failures)


def says_one_of(line: str, names: Sequence[str]) -> bool:
  """Whether an error names what is at fault."""
  return any(name in line for name in names)
