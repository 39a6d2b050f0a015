"""How the time of linear attention grows with the text, on this machine.

The part of `launch.bench.kernels` for --ops=linear: XLA's passes, all lengths
in turns, and the slope of log time by log length, which is 1 where time grows
as the text does and 2 where it grows as its square.
"""

from collections.abc import Callable, Sequence
import os

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from kernels_pallas.linear_attention import api
from launch.bench import harness

_HEADS, _HEAD_DIM = 8, 64
_PASSES = ("forward", "backward")


def report(
    target: str, lengths: Sequence[int], *, num_times: int = 5
) -> list[harness.Row]:
  """Prints times and slopes; returns the rows.

  Args:
    target: cpu; kernels' schedules go with --ops=attention.
    lengths: T, two or more.
    num_times: Calls of each program.

  Raises:
    ValueError: If the target is another, or there is one length alone.
  """
  if target != "cpu":
    raise ValueError(f"--ops=linear knows cpu, not {target}")
  if len(set(lengths)) < 2:
    raise ValueError(
        f"--ops=linear fits a slope to two lengths or more, got {lengths}"
    )
  rows = _rows(lengths, num_times)
  harness.tell("linear attention", rows)
  for name in _PASSES:
    times = [row[f"{name}_s"] for row in rows]
    found = slope([row["length"] for row in rows], times)
    print(f"{name}: log-log slope of time in T {found:.3f}")
  return rows


def slope(lengths: Sequence[int], seconds: Sequence[float]) -> float:
  """The least squares line's of log seconds by log length."""
  return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])


def _rows(lengths: Sequence[int], num_times: int) -> list[harness.Row]:
  turns = {
      (name, length): _turn(name, length)
      for length in lengths
      for name in _PASSES
  }
  named = {f"{name} {length}": turn for (name, length), turn in turns.items()}
  times = harness.take_turns(named, num_times)
  return [
      {
          "length": length,
          **{
              f"{name}_s": float(np.median(times[f"{name} {length}"]))
              for name in _PASSES
          },
          "num_times": num_times,
          "load_1min": os.getloadavg()[0],
      }
      for length in lengths
  ]


def _turn(name: str, length: int) -> Callable[[], object]:
  """A call of one pass, by which it waits; backward has forward in it."""
  shape = (1, length, _HEADS, _HEAD_DIM)
  keys = jax.random.split(jax.random.key(0), 3)
  arrays = tuple(jax.random.normal(key, shape) for key in keys)
  decay = jnp.full(_HEADS, 0.99)

  def attend(*arrays: Array) -> Array:
    return api.linear_attention(*arrays, decay=decay, implementation="xla").out

  run = attend
  if name == "backward":
    run = jax.grad(lambda *x: jnp.square(attend(*x)).sum(), argnums=(0, 1, 2))
  made = jax.jit(run).lower(*arrays).compile()
  return lambda: jax.block_until_ready(made(*arrays))
