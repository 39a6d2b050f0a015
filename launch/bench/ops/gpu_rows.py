"""Rows of what a GPU took: jobs, times, and a table.

A time is that of one call, from programs of several calls on different random
inputs, together larger than the GPU's cache, with 50 calls or more between two
synchronisations; median and quartiles of several such times.
"""

from collections.abc import Callable, Iterable, Iterator
import math
import time
from typing import NamedTuple, Protocol

import jax
from jaxtyping import PyTree
import numpy as np

from launch.bench import harness

# Median of a call's time, and its quartiles, in seconds.
Time = tuple[float, tuple[float, float]]
# What makes arguments of a seed.
Make = Callable[[int], PyTree]

# tflops: needed FLOPs, those of allowed pairs, by time. gb_per_s: bytes that
# must be moved, by time. of_copy: the same by what the copy of this run moves.
# slope: of log time over log T. error: norm of the difference to float64 by the
# norm. note: why there is no figure.
_COLUMNS: harness.Columns = {
    "what": ("what", str),
    "peer": ("by", str),
    "case": ("case", str),
    "median_ms": ("ms", "{:.4g}".format),
    "quartiles_ms": ("quartiles", lambda x: "{:.4g}, {:.4g}".format(*x)),
    "tflops": ("TFLOP/s", "{:.1f}".format),
    "gb_per_s": ("GB/s", "{:.0f}".format),
    "of_copy": ("of copy", "{:.2f}".format),
    "slope": ("slope", "{:.2f}".format),
    "error": ("error", "{:.2e}".format),
    "note": ("note", str),
}


class Timer(Protocol):
  """`time_calls` with its numbers chosen."""

  def __call__(
      self,
      fn: Callable[..., PyTree],
      make: Make,
      *,
      is_in_place: bool = ...,
  ) -> Time:
    """Times `fn(*make(seed))`."""
    ...


class Job(NamedTuple):
  """A row to be made: `run` returns its figures."""

  what: str
  peer: str
  case: str
  run: Callable[[], harness.Row]


def table(rows: Iterable[harness.Row]) -> str:
  """Formats rows as a Markdown table."""
  return harness.table(_COLUMNS, rows)


def rows_of(jobs: Iterable[Job], deadline: float) -> Iterator[harness.Row]:
  """Yields the rows of jobs in turn; bandwidths beside that of the first copy.

  Args:
    jobs: What to run; the copy is among the jobs called "ceiling".
    deadline: Of `time.monotonic`; rows after it are left out, and say so.
  """
  copied = None
  for job in jobs:
    row = row_of(job, deadline)
    speed = row.get("gb_per_s")
    if speed and job.what == "ceiling":
      copied = copied or speed
    yield row | ({"of_copy": speed / copied} if speed and copied else {})


def row_of(job: Job, deadline: float) -> harness.Row:
  """The row of a job, or one that says why there is none."""
  row = {"what": job.what, "peer": job.peer, "case": job.case, "note": ""}
  if time.monotonic() > deadline:
    return row | {"note": "not measured: no time left"}
  try:
    return row | job.run()
  except Exception as error:  # Whatever a peer raises costs its row alone.
    lines = str(error).strip().splitlines() or [""]
    return row | {"note": f"{type(error).__name__}: {lines[0][:200]}"}


def timed(
    timer: Timer,
    fn: Callable[..., PyTree],
    make: Make,
    *,
    work: tuple[int, int] = (0, 0),
    is_in_place: bool = False,
) -> Callable[[], harness.Row]:
  """What times a program when it is called, for a `Job`.

  Args:
    timer: What times.
    fn: The program.
    make: Its arguments.
    work: FLOPs, and bytes that must be moved; 0 is neither's rate.
    is_in_place: As `time_calls`.
  """
  flops, num_bytes = work

  def run() -> harness.Row:
    median, (lower, upper) = timer(fn, make, is_in_place=is_in_place)
    return {
        "median_ms": 1e3 * median,
        "quartiles_ms": (1e3 * lower, 1e3 * upper),
        "tflops": flops / median / 1e12 if flops else None,
        "gb_per_s": num_bytes / median / 1e9 if num_bytes else None,
    }

  return run


def time_calls(
    fn: Callable[..., PyTree],
    make: Make,
    *,
    num_times: int,
    calls_per_sync: int,
    rotated_bytes: int,
    is_in_place: bool = False,
) -> Time:
  """Times `fn(*make(seed))`: median and quartiles, in seconds a call.

  Args:
    fn: What is timed.
    make: Arguments of a seed.
    num_times: Times of which the median is taken.
    calls_per_sync: At least so many calls a time.
    rotated_bytes: Size of the inputs that are gone through.
    is_in_place: Whether results are the arguments of the next call, which are
      donated.
  """
  one = jax.block_until_ready(make(0))
  num_bytes = sum(x.nbytes for x in jax.tree.leaves(one))
  # At most 16 calls in a program, and 4 GiB of inputs.
  most = max(min(16, 2**32 // num_bytes), 2)
  num_sets = min(max(math.ceil(rotated_bytes / num_bytes), 4), most)
  sets = [one, *(make(seed) for seed in range(1, num_sets))]
  run = lambda sets: [fn(*arguments) for arguments in sets]
  program = jax.jit(run, donate_argnums=(0,) if is_in_place else ())
  result = jax.block_until_ready(program(sets))
  repeats = math.ceil(calls_per_sync / num_sets)
  times = []
  for _ in range(num_times):
    start = time.perf_counter()
    for _ in range(repeats):
      result = program(result if is_in_place else sets)
    jax.block_until_ready(result)
    times.append((time.perf_counter() - start) / (repeats * num_sets))
  lower, median, upper = np.percentile(times, (25, 50, 75))
  return float(median), (float(lower), float(upper))
