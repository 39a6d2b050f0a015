import dataclasses
import functools
import itertools
import time
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import interpret
from kernels_pallas.gather_mlp import shapes as gather_shapes
from launch.bench.ops import gpu_rows
from launch.bench.ops import memory_gpu

_TINY = memory_gpu.Sizes(
    batches=(1,),
    capacities=(192, 128),
    mlps=("tiny",),
    lengths=(64, 128),
    implementations=("xla",),
)
_MLP = gather_shapes.Shape(
    batch=2, width=64, num_neurons=640, block_size=64, is_gated=True
)
_TIMER = functools.partial(
    gpu_rows.time_calls, num_times=2, calls_per_sync=4, rotated_bytes=1
)


def traced(fn, make, is_in_place=False):
  """A timer that traces: what a row counts does not depend on the time."""
  del is_in_place
  jax.eval_shape(lambda: fn(*make(0)))
  return 0.5, (0.25, 1.0)


def rows_of(*jobs):
  with mock.patch.dict(gather_shapes.BENCHMARKS, {"tiny": _MLP}):
    return list(
        gpu_rows.rows_of(itertools.chain(*jobs), time.monotonic() + 1e4)
    )


class OpsTest(parameterized.TestCase):

  def test_rows_of_decode(self):
    rows = rows_of(memory_gpu.decode_jobs(traced, _TINY))
    self._check_timed(row for row in rows if row["peer"] == "xla")
    # Of each size: two types, and attention alone by two.
    self.assertLen(rows, 2 * 4)
    full, kept = (x["gb_per_s"] * x["median_ms"] for x in (rows[0], rows[4]))
    # Bytes of 192 slots, and of 128, of 8 heads; and what does not grow.
    self.assertGreater(full / kept, 1.4)
    self.assertLess(full / kept, 1.5)

  def test_rows_of_an_mlp(self):
    rows = rows_of(memory_gpu.mlp_jobs(traced, _TINY))
    self._check_timed(rows)
    self.assertEqual(
        [row["what"] for row in rows],
        [
            "MLP at 10%",
            "dense MLP",
            "MLP at 10% gradients",
            "dense MLP gradients",
        ],
    )
    chosen, dense = (row["tflops"] * row["median_ms"] for row in rows[:2])
    self.assertAlmostEqual(dense / chosen, 10, places=5)

  def test_rows_of_linear_attention(self):
    rows = rows_of(memory_gpu.linear_jobs(traced, _TINY))
    timed = [row for row in rows if "slope" not in row]
    self._check_timed(timed)
    self.assertLen(timed, 4)
    self.assertLen(rows, 6)

  @pytest.mark.slow
  def test_a_program_is_run_to_be_timed(self):
    sizes = dataclasses.replace(_TINY, batches=(), mlps=("tiny",))
    row, *_ = rows_of(itertools.islice(memory_gpu.mlp_jobs(_TIMER, sizes), 1))
    self._check_timed([row])
    low, high = row["quartiles_ms"]
    self.assertBetween(row["median_ms"], low, high)

  def test_slopes(self):
    times = {length: 3e-4 * length**2 for length in (8, 16, 64)}
    self.assertAlmostEqual(memory_gpu._slope(times)["slope"], 2)
    (job,) = [gpu_rows.Job("x", "y", "z", lambda: memory_gpu._slope({8: 1.0}))]
    row = gpu_rows.row_of(job, time.monotonic() + 1)
    self.assertIn("fewer than two lengths were timed", row["note"])

  def test_bandwidths_stand_beside_the_copy(self):
    job = lambda what, speed: gpu_rows.Job(
        what, "", "", lambda: {"gb_per_s": speed}
    )
    jobs = [job("early", 3.0), job("ceiling", 2.0), job("late", 1.0)]
    rows = list(gpu_rows.rows_of(jobs, time.monotonic() + 1))
    self.assertEqual([row.get("of_copy") for row in rows], [None, 1.0, 0.5])
    self.assertIn("| 0.50 |", gpu_rows.table(rows).splitlines()[-1])

  def test_calls_in_place_go_on_from_each_other(self):
    seen = []

    def step(x):
      jax.debug.callback(lambda y: seen.append(float(y)), x[0])
      return (x + 1,)

    median, _ = gpu_rows.time_calls(
        step,
        lambda seed: (jnp.full(4, 100.0 * seed),),
        num_times=2,
        calls_per_sync=8,
        rotated_bytes=1,
        is_in_place=True,
    )
    jax.effects_barrier()
    self.assertGreater(median, 0)
    # Four sets; one call that does not count, twice two that do.
    self.assertEqual(
        sorted(seen), [100.0 * s + i for s in range(4) for i in range(5)]
    )

  @parameterized.parameters("decode", "mlp", "attention")
  @pytest.mark.slow
  def test_the_kernels_interpreted(self, op):
    if jax.__version_info__ < (0, 11):
      self.skipTest("Mosaic GPU kernels need jax >= 0.11")
    sizes = dataclasses.replace(
        _TINY,
        implementations=("pallas_gpu",),
        capacities=(128,),
        lengths=(64, 128)[: 1 + (op == "attention")],
    )
    jobs_of = {
        "decode": memory_gpu.decode_jobs,
        "mlp": memory_gpu.mlp_jobs,
        "attention": memory_gpu.linear_jobs,
    }

    def timer(fn, make, is_in_place=False):
      del is_in_place
      jax.block_until_ready(jax.jit(fn)(*make(0)))
      return 1.0, (1.0, 1.0)  # An interpreter's time says nothing.

    with interpret.interpreted():
      rows = rows_of(
          memory_gpu.error_jobs(sizes, (op,)), jobs_of[op](timer, sizes)
      )
    errors = [row for row in rows if row["what"].startswith("error")]
    self.assertLen(errors, 2)
    for row in errors:
      self.assertIn("error", row)
      self.assertBetween(row["error"], 1e-5, 2e-2)
    ours = [row for row in rows if row["peer"] == "pallas_gpu"]
    timed = [row for row in ours if "error" not in row and "slope" not in row]
    self._check_timed(timed)
    self.assertLen(timed, 4 if op == "attention" else 2)

  def _check_timed(self, rows):
    for row in rows:
      self.assertEqual(row["note"], "", row)
      self.assertGreater(row["median_ms"], 0)
      self.assertGreater(row["gb_per_s"], 0)


if __name__ == "__main__":
  absltest.main()
