"""Rows of what a GPU took: jobs, times, and a table.

A time is that of one call, from programs of several calls on different random
inputs, together larger than the GPU's cache, with 50 calls or more between two
synchronisations; median and quartiles of several such times.
"""

from collections.abc import Callable, Iterable
import dataclasses
import math
import time
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One line of the table.

  Attributes:
    what: What is computed.
    peer: By whom.
    case: Shape and mask.
    median_ms: Of a call.
    quartiles_ms: Lower and upper.
    tflops: Needed FLOPs, those of allowed pairs, by time.
    gb_per_s: Bytes that must be moved, by time.
    of_copy: The same by what the copy of this run moves.
    slope: Of log time over log T, in the rows of slopes.
    error: Norm of the difference to float64 by the norm, in the errors' rows.
    note: Why there is no figure.
  """

  what: str
  peer: str
  case: str
  median_ms: float | None = None
  quartiles_ms: tuple[float, float] | None = None
  tflops: float | None = None
  gb_per_s: float | None = None
  of_copy: float | None = None
  slope: float | None = None
  error: float | None = None
  note: str = ""


def table(rows: Iterable[Row]) -> str:
  """Formats rows as a Markdown table."""
  lines = [
      (
          "| what | by | case | ms (quartiles) | TFLOP/s | GB/s | of copy |"
          " slope | error | note |"
      ),
      f"|{' --- |' * 10}",
  ]
  for row in rows:
    text = lambda value, form: "" if value is None else format(value, form)
    times = text(row.median_ms, ".4g")
    if row.quartiles_ms is not None:
      times += " ({:.4g}, {:.4g})".format(*row.quartiles_ms)
    cells = (row.what, row.peer, row.case, times, text(row.tflops, ".1f"))
    cells += (text(row.gb_per_s, ".0f"), text(row.of_copy, ".2f"))
    cells += (text(row.slope, ".2f"), text(row.error, ".2e"), row.note)
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Job:
  """A row to be made: `run` returns its figures."""

  what: str
  peer: str
  case: str
  run: Callable[[], dict[str, Any]]


def rows_of(
    jobs: Iterable[Job],
    deadline: float,
    tell: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
  """The rows of jobs in turn; bandwidths beside that of the first copy.

  Args:
    jobs: What to run; the copy is among the jobs called "ceiling".
    deadline: Of `time.monotonic`; rows after it are left out, and say so.
    tell: Is given each row as soon as it is known.
  """
  rows, copied = [], None
  for job in jobs:
    row = row_of(job, deadline)
    if row.gb_per_s and job.what == "ceiling":
      copied = copied or row.gb_per_s
    if row.gb_per_s and copied:
      row = dataclasses.replace(row, of_copy=row.gb_per_s / copied)
    rows.append(row)
    tell(row)
  return rows


def row_of(job: Job, deadline: float) -> Row:
  """The row of a job, or one that says why there is none."""
  row = Row(what=job.what, peer=job.peer, case=job.case)
  if time.monotonic() > deadline:
    return dataclasses.replace(row, note="not measured: no time left")
  try:
    return dataclasses.replace(row, **job.run())
  except Exception as error:  # Whatever a peer raises costs its row alone.
    lines = str(error).strip().splitlines() or [""]
    note = f"{type(error).__name__}: {lines[0][:200]}"
    return dataclasses.replace(row, note=note)


def timing(
    timer: Callable[..., Any],
    call: Callable[..., Any],
    make: Callable[[int], Any],
    flops: float,
    num_bytes: float,
) -> dict[str, Any]:
  """Figures of a time."""
  median, (lower, upper) = timer(call, make)
  return {
      "median_ms": 1e3 * median,
      "quartiles_ms": (1e3 * lower, 1e3 * upper),
      "tflops": flops / median / 1e12 if flops else None,
      "gb_per_s": num_bytes / median / 1e9 if num_bytes else None,
  }


def time_calls(
    fn: Callable[..., Any],
    make: Callable[[int], Any],
    *,
    num_times: int,
    calls_per_sync: int,
    rotated_bytes: int,
    is_in_place: bool = False,
) -> tuple[float, tuple[float, float]]:
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
