"""Times the first and the second start of every script.

  python -m launch.bench.starts --output=starts.json
  python -m launch.bench.starts --scripts=train_lm,generate

Every script does all of its work at its smallest (`--preset=smoke` where it has
one), twice, in processes of its own, with stdout and stderr piped: first with
an empty folder of compiled programs, then with what the first start left there.
Nothing else is kept between the two. Seconds are by the clock, imports
included; `silent` is the longest time without a line.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import os
import pathlib
import tempfile

from launch.bench import harness
from launch.bench.starts import commands
from launch.bench.starts import watched

_ROOT = pathlib.Path(__file__).parents[3]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartsConfig:
  """What to start.

  Attributes:
    scripts: Names of scripts, as in train_lm; by default all.
  """

  scripts: tuple[str, ...] = commands.NAMES

  def __post_init__(self):
    commands.check(self.scripts)


_COLUMNS = {
    "script": ("script", str),
    "first_s": ("first, s", "{:.1f}".format),
    "second_s": ("second, s", "{:.1f}".format),
    "first_cpu_s": ("first, CPU s", "{:.1f}".format),
    "second_cpu_s": ("second, CPU s", "{:.1f}".format),
    "programs": ("programs kept", str),
    "mb": ("MB", "{:.1f}".format),
    "silence_s": ("silent, s", "{:.1f}".format),
}


def measure(config: StartsConfig) -> harness.Row:
  """Starts every script twice; prints and returns the table."""
  machine = harness.machine_facts()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    (folder / commands.TEXT).write_text(commands.LINES)
    _leave(folder)
    rows = [_start_twice(script, folder) for script in config.scripts]
  harness.tell("machine", machine)
  print(f"\nstarts\n\n{harness.table(_COLUMNS, rows)}")
  return {"machine": machine, "starts": rows}


def _leave(folder: pathlib.Path) -> None:
  """Makes the run and the model that scripts read; neither is timed."""
  for script, left in commands.LEFT.items():
    _start(script, left, folder, folder / "before")


def _start_twice(script: str, folder: pathlib.Path) -> harness.Row:
  kept = folder / f"{script}_compiled"
  first, second = (
      _start(script, f"{script}_{number}", folder, kept) for number in (1, 2)
  )
  programs = [*kept.glob("*-cache")]
  return {
      "script": script,
      "first_s": first.seconds,
      "second_s": second.seconds,
      "first_cpu_s": first.cpu_seconds,
      "second_cpu_s": second.cpu_seconds,
      "programs": len(programs),
      "mb": _num_bytes(programs) / 1e6,
      "silence_s": max(first.silence_s, second.silence_s),
  }


def _start(
    script: str, own: str, folder: pathlib.Path, kept: pathlib.Path
) -> watched.Start:
  arguments = ["-m", f"launch.{script}", *commands.arguments(script, own)]
  arguments.append(f"--compilation_cache={kept}")
  return watched.start(arguments, folder, _environment(os.environ))


def _environment(ours: Mapping[str, str]) -> dict[str, str]:
  """This process's, from which this tree is found and no cache is."""
  kept = {k: v for k, v in ours.items() if k != "JAX_COMPILATION_CACHE_DIR"}
  path = [str(_ROOT), *filter(None, [ours.get("PYTHONPATH")])]
  return kept | {"PYTHONPATH": os.pathsep.join(path)}


def _num_bytes(files: Iterable[pathlib.Path]) -> int:
  return sum(path.stat().st_size for path in files)


if __name__ == "__main__":
  harness.run(StartsConfig(), measure)
