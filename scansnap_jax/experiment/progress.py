"""A progress bar for people, and silence for everyone else."""

from collections.abc import Callable, Iterator
import contextlib
import sys

from rich import console as rich_console
from rich import progress


class _RunsPerSecond(progress.ProgressColumn):
  """Whole runs per second, from steps per second."""

  def render(self, task: progress.Task) -> str:
    """Returns such as `83.1 runs/s`."""
    if not task.speed:
      return "  -- runs/s"
    return f"{task.speed / task.fields['steps_per_run']:4.3g} runs/s"


@contextlib.contextmanager
def bar(
    name: str, *, num_runs: int, steps_per_run: int
) -> Iterator[Callable[[int], None]]:
  """Shows runs per second and the remaining time, if stderr is a terminal.

  Args:
    name: What is being run.
    num_runs: How many runs there are in all.
    steps_per_run: How many steps each takes.

  Yields:
    A function to be told how many steps of single runs have been taken since.
  """
  if not sys.stderr.isatty():
    yield lambda num_run_steps: None
    return
  with progress.Progress(
      progress.TextColumn("{task.description}", markup=False),
      progress.BarColumn(),
      progress.TaskProgressColumn(),
      _RunsPerSecond(),
      progress.TimeRemainingColumn(),
      console=rich_console.Console(stderr=True),
  ) as display:
    task = display.add_task(
        name, total=num_runs * steps_per_run, steps_per_run=steps_per_run
    )
    yield lambda num_run_steps: display.advance(task, num_run_steps)
