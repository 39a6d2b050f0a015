"""What all benchmarks share: the script, turns, statistics, facts, tables.

  if __name__ == "__main__":
    harness.run(BenchConfig(), measure)

Contestants take turns, round by round, in one process, so that what else the
machine does falsifies all alike. Turns that compile and warm up do not count.
The median over rounds counts, and a ratio is the median of the ratios within a
round. Other programs on the machine falsify the times all the same.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import time
from typing import Any, NamedTuple, TypeVar

from absl import flags
import numpy as np

from launch.command import app
from launch.command import flag_config
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import workdir

flags.disclaim_key_flags()  # --help lists the flags under the script.

ConfigT = TypeVar("ConfigT")
# A line of a table: values by the names of its columns.
Row = dict[str, Any]
# Is given each row as soon as it is known.
Tell = Callable[[Row], None]
# By a row's key: a title, and what makes text of a value.
Columns = Mapping[str, tuple[str, Callable[[Any], str]]]


def run(
    config: ConfigT,
    measure: Callable[[ConfigT], object],
    *,
    num_cpu_devices: int = 1,
) -> None:
  """Runs a script: a flag a field, --output, and what it measures as JSON.

  Args:
    config: A frozen dataclass of defaults.
    measure: Measures and prints; its result is written.
    num_cpu_devices: Devices to split a CPU into, 0 for one a core. One takes
      all cores for its computations.
  """
  path = flags.DEFINE_string("output", None, "JSON file to write.")
  build = flag_config.define(config)

  def main(_: list[str]) -> None:
    # Imported here, so that --help and wrong flags answer at once.
    from scansnap_jax.experiment.processes import devices

    check_compiles()
    write = writer(path.value)
    devices.set_up(num_cpu_devices=num_cpu_devices)
    write(measure(build()))

  app.run(main, keeps_compiled=False)


def check_compiles() -> None:
  """Raises UserError where jax was told to compile nothing."""
  import jax  # Not before flags are read.

  # The flag is made as jax is imported, and a context may set it.
  if jax.config.jax_disable_jit:  # pyrefly: ignore[missing-attribute]
    raise errors.UserError(
        "JAX_DISABLE_JIT=1 leaves nothing to measure: a benchmark times what"
        " jax compiles. Unset it."
    )


def define_model(text: str, *, is_required: bool = False) -> flags.FlagHolder:
  """Defines --model."""
  return flags.DEFINE_string("model", None, text, required=is_required)


def writer(path: str | None) -> Callable[[object], None]:
  """Returns what writes a result; refuses a path before that is measured.

  Args:
    path: JSON file, made with the folders above it; None writes none.

  Raises:
    UserError: There can be no such file.
  """
  if path is None:
    return lambda result: None
  file = json_file.local_path(path)
  workdir.check_can_be_made(file, "--output")

  def write(result: object) -> None:
    workdir.make_folder(file.absolute().parent)
    workdir.write_atomic(file, json.dumps(result, indent=2) + "\n")

  return write


def run_child(
    module: str,
    arguments: Sequence[str],
    env: Mapping[str, str] | None = None,
) -> Row:
  """Measures in a fresh process, which prints its row last, as JSON.

  Args:
    module: What `python -m` runs.
    arguments: Of its command line.
    env: Its environment; None is that of this process.

  Raises:
    UserError: The process failed. What it said on stderr is there already; its
      last line is said again.
  """
  finished = subprocess.run(
      [sys.executable, "-m", module, *arguments],
      cwd=pathlib.Path(__file__).parents[2],
      capture_output=True,
      env=env,
      text=True,
      check=False,
  )
  if finished.returncode == 0:
    sys.stderr.write(finished.stderr)
    return json.loads(finished.stdout.splitlines()[-1])
  said = finished.stderr.strip() or "it said nothing"
  if "Traceback" in said:  # A fault of the program's, which should be seen.
    sys.stderr.write(finished.stderr)
  last = said.splitlines()[-1].removeprefix("error: ")
  raise errors.UserError(
      f"the process of {module} ended with {finished.returncode}: {last}"
  )


def require(packages: Iterable[str], flag: str) -> None:
  """Raises unless what is to be measured beside ours is installed.

  Args:
    packages: Names of modules.
    flag: Leaves the peer out.

  Raises:
    UserError: One of them is not installed.
  """
  for name in packages:
    if importlib.util.find_spec(name) is None:
      raise errors.UserError(
          f"{name} is not installed: pip install 'scansnap-jax[bench]', or give"
          f" {flag}"
      )


def take_turns(
    turns: Mapping[str, Callable[[], object]],
    num_rounds: int,
    *,
    num_warm_ups: int = 1,
    num_steps: int = 1,
    pause_s: float = 0.0,
) -> dict[str, np.ndarray]:
  """Times contestants in turns, A B A B; seconds a step of each round.

  Args:
    turns: What a turn is, by contestant. It waits for its results.
    num_rounds: Rounds that count.
    num_warm_ups: Rounds before them that do not.
    num_steps: Steps of a turn.
    pause_s: Before each turn: threads of the one before may still spin.
  """
  seconds: dict[str, list[float]] = {name: [] for name in turns}
  for _ in range(num_warm_ups + num_rounds):
    for name, turn in turns.items():
      time.sleep(pause_s)
      started = time.perf_counter()
      turn()
      seconds[name].append((time.perf_counter() - started) / num_steps)
  return {name: np.array(x[num_warm_ups:]) for name, x in seconds.items()}


class Contestant(NamedTuple):
  """One way to take steps of training.

  Attributes:
    loss: Of the common batch at the common parameters, nothing dropped.
    turn: Takes the steps of a turn.
  """

  loss: float
  turn: Callable[[], object]


def compare(
    contestants: Mapping[str, Contestant],
    beside: Iterable[str],
    num_rounds: int,
    num_steps: int,
) -> list[Row]:
  """Times contestants in turns; returns a table.

  Args:
    contestants: By the names of their rows.
    beside: Names of rows whose time is set against that of each.
    num_rounds: Rounds that count.
    num_steps: Steps of a turn.
  """
  turns = {name: contestant.turn for name, contestant in contestants.items()}
  seconds = take_turns(turns, num_rounds, num_steps=num_steps, pause_s=0.05)
  return [
      {
          "row": name,
          "loss": contestant.loss,
          "step_ms": 1e3 * float(np.median(seconds[name])),
          "least_ms": 1e3 * float(seconds[name].min()),
      }
      | {f"{x} over it": ratio(seconds[x], seconds[name]) for x in beside}
      for name, contestant in contestants.items()
  ]


def quartiles_ms(seconds: np.ndarray, prefix: str = "") -> Row:
  """Median, distance of the quartiles, and least, in milliseconds."""
  low, median, high = 1e3 * np.quantile(seconds, (0.25, 0.5, 0.75))
  return {
      f"{prefix}ms": float(median),
      f"{prefix}iqr_ms": float(high - low),
      f"{prefix}least_ms": float(1e3 * seconds.min()),
  }


def ratio(above: np.ndarray, below: np.ndarray) -> float:
  """Median of the ratios within a round."""
  return float(np.median(above / below))


def seconds_of(call: Callable[[], object], num_calls: int) -> np.ndarray:
  """Seconds of each of so many calls, the first of which may compile."""
  times = [time.perf_counter()]
  for _ in range(num_calls):
    call()
    times.append(time.perf_counter())
  return np.diff(times)


def machine_facts(*, names_devices: bool = False) -> Row:
  """CPU, cores, load, versions; and devices, which asking for them starts."""
  from scansnap_jax.experiment.processes import devices

  versions = {"python": platform.python_version()}
  for package in ("jax", "jaxlib", "numpy", "torch"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  cpu = platform.processor() or platform.machine()
  with contextlib.suppress(OSError):
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        cpu = line.partition(":")[2].strip()
  cores, load = devices.num_cores(), os.getloadavg()[0]
  facts = {"cpu": cpu, "cores": cores, "load_1min": load, **versions}
  return facts | ({"devices": devices.describe()} if names_devices else {})


def peak_rss_gb() -> float:
  """The most memory that this process has held, in 1e9 bytes.

  It starts from what the parent held when it began this process.
  """
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def show(value: object) -> str:
  """A value as text: numbers to four digits."""
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(columns: Columns, rows: Iterable[Mapping[str, Any]]) -> str:
  """Formats rows as Markdown; what a row lacks, or has as None, is empty."""
  lines = [
      f"| {' | '.join(title for title, _ in columns.values())} |",
      f"|{' --- |' * len(columns)}",
  ]
  for row in rows:
    cells = (
        "" if row.get(name) is None else _cell(form(row[name]))
        for name, (_, form) in columns.items()
    )
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _cell(text: str) -> str:
  """A text as a cell of Markdown: names may have bars, errors line ends."""
  return " ".join(text.splitlines()).replace("|", r"\|")


def tell(title: str, found: Row | list[Row]) -> None:
  """Prints what was measured: rows as a table, facts as a list.

  Args:
    title: Above it.
    found: Rows; or facts by name, some of which may be either again.
  """
  print(f"\n{title}\n")
  if isinstance(found, list):
    print(table({k: (k, show) for row in found for k in row}, found))
    return
  inner = {k: v for k, v in found.items() if isinstance(v, list | dict)}
  for name in (x for x in found if x not in inner):
    print(f"- {name}: {show(found[name])}")
  for name, value in inner.items():
    tell(f"{title}: {name}", value)
  sys.stdout.flush()
