import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from kernels_pallas.aot import budgets
from kernels_pallas.aot import bundles
from kernels_pallas.aot import chips
from kernels_pallas.aot import jobs
from kernels_pallas.aot import schedule
from kernels_pallas.aot import topology

_PROGRAMS = "tests.kernels_pallas.aot.programs:"
_BLOCK = 256


def _job(chip, name, **kwargs):
  return jobs.Job(chip, _PROGRAMS + name, kwargs)


def _leaf(kind, num_bundles, issued, *regions):
  units = {"VSTORE:SPILL": 1}
  return bundles.Region(kind, 0, num_bundles, units, issued, regions)


class KernelScheduleTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    grid = _leaf("loop", 10, 120, _leaf("branch", 50, 0), _leaf("loop", 7, 70))
    self.schedule = schedule.KernelSchedule(
        name="k",
        chip="v5e",
        tree=_leaf("kernel", 3, 3, grid),
        capacity={"VSTORE:SPILL": 1},
        vmem_bytes=0,
    )

  def test_sums_over_the_regions(self):
    self.assertEqual(self.schedule.bundles, 70)
    self.assertEqual(self.schedule.issued, 193)
    self.assertEqual(self.schedule.spills, 4)
    self.assertEqual(schedule.seconds(3 * 10**9, "v5e"), 2.0)

  def test_what_is_not_decided_has_no_number(self):
    unclear = dataclasses.replace(self.schedule, undecided="branch on data")
    self.assertIsNone(unclear.issued)
    self.assertIn("branch on data", str(unclear))
    self.assertNotIn("branch on data", str(self.schedule))


@functools.cache
def _reports():
  """Schedules of the v5e, by job."""
  return _reported([
      _job("v5e", "matmul", block=_BLOCK),
      _job("v5e", "normalize", rows=256),
      _job("v5e", "normalize", rows=256, rolled=True),
      _job("v5e", "normalize", rows=1024),
      _job("v5e", "write_row", donate=False),
  ])


@functools.cache
def _of_other_chips():
  names = [name for name in chips.TPU_NAMES if name != "v5e"]
  return _reported([_job(name, "matmul", block=_BLOCK) for name in names])


def _reported(jobs):
  return dict(zip(map(str, jobs), schedule.report(jobs), strict=True))


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class ReportTest(parameterized.TestCase):

  def _kernel(self, *args, **kwargs):
    job = str(_job(*args, **kwargs))
    reports = _reports()
    (kernel,) = (reports if job in reports else _of_other_chips())[job].kernels
    return kernel

  @parameterized.parameters(*chips.TPU_NAMES)
  @pytest.mark.by_default(1)
  def test_work_lies_in_the_loops_and_branches_that_were_written(self, chip):
    kernel = self._kernel(chip, "matmul", block=_BLOCK)
    # A block of float32 is 64 registers of 8 x 128, stored once by the
    # initialisation, by a round of either loop, and by the flush.
    found = [
        region.kind
        for region in kernel.tree.walk()
        if 50 <= region.units["VSTORE"] <= 70
    ]
    self.assertEqual(found, ["branch", "loop", "loop", "branch"])
    kinds = [region.kind for region in kernel.tree.regions]
    self.assertEqual(kinds[-1], "loop", "the grid loop ends the kernel")

  @parameterized.parameters(*chips.TPU_NAMES)
  @pytest.mark.slow
  def test_loops_run_as_often_as_was_written(self, name):
    kernel = self._kernel(name, "matmul", block=_BLOCK)
    self.assertEqual(kernel.num_steps, 4)
    # Of a grid of 2 x 2: init and flush twice; four products a step; k in all
    # steps of the second column.
    runs = [
        region.issued / region.bundles
        for region in kernel.tree.walk()
        if 50 <= region.units["VSTORE"] <= 70
    ]
    # The pipeline's prologue and epilogue, and delay slots, are shared.
    np.testing.assert_allclose(runs, [2, 16, 2, 2], rtol=0.05)
    self.assertEmpty(kernel.undecided)

  @parameterized.parameters(*chips.TPU_NAMES)
  @pytest.mark.slow
  def test_a_product_takes_as_long_as_the_peak_rate_allows(self, name):
    chip = chips.get_chip(name)
    kernel = self._kernel(name, "matmul", block=_BLOCK)
    peak_sec = 2 * _BLOCK**3 * chip.num_cores / chip.bf16_flops_per_sec
    loops = [
        region
        for region in kernel.tree.walk()
        if region.kind == "loop" and 50 <= region.units["VSTORE"] <= 70
    ]
    self.assertLen(loops, 2)
    for loop in loops:
      ratio = schedule.seconds(loop.bundles, name) / peak_sec
      self.assertBetween(ratio, 1, 2.5)

  @pytest.mark.slow
  def test_registers_that_run_out_are_seen(self):
    self.assertEqual(self._kernel("v5e", "normalize", rows=256).spills, 0)
    spilling = self._kernel("v5e", "normalize", rows=1024)
    self.assertGreater(spilling.spills, 50)
    self.assertGreater(spilling.fills, 50)

  @pytest.mark.slow
  def test_bundles_that_rise_break_the_budget(self):
    lean = self._kernel("v5e", "normalize", rows=256)
    rolled = self._kernel("v5e", "normalize", rows=256, rolled=True)
    budget = {"bundles": lean.bundles, "spills": lean.spills}
    self.assertEmpty(
        budgets.check({"bundles": lean.bundles, "spills": 0}, budget)
    )
    (sentence,) = budgets.check(
        {"bundles": rolled.bundles, "spills": 0}, budget
    )
    self.assertRegex(sentence, r"bundles rose from \d+ to \d+")

  @pytest.mark.slow
  def test_the_rest_of_the_program_is_reported_too(self):
    matmul = _reports()[str(_job("v5e", "matmul", block=_BLOCK))]
    self.assertEqual((matmul.fusion_cycles, matmul.temp_bytes), (0, 0))
    self.assertEqual(matmul.kernels[0].name, "matmul.1")
    self.assertGreater(matmul.kernels[0].vmem_bytes, 2**18)
    self.assertIn("loop ", str(matmul.kernels[0]))


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class FailureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_a_program_that_fails_is_named(self):
    failing = [
        _job("v5e", "fail"),
        _job("v5e", "prefetched", num_scalars=1 << 18),
    ]
    first, second = jobs.run(failing)
    self.assertEqual(first, {"error": "ValueError: no such program"})
    self.assertRegex(second["error"], "^OutOfSmem: smem overflows")
    with self.assertRaisesRegex(jobs.JobFailed, "programs:fail.*no such prog"):
      jobs.check(failing[0], first)

  def test_a_libtpu_without_the_flags_is_a_missing_toolchain(self):
    folder = self.create_tempdir().full_path
    with self.assertRaisesRegex(topology.ToolchainMissing, "no final_bundles"):
      schedule._dump(schedule.pathlib.Path(folder), "k.1", "final_bundles")

  @pytest.mark.slow
  def test_a_worker_that_dies_shows_its_log(self):
    with self.assertRaisesRegex(jobs.JobFailed, "No module named 'nowhere'"):
      jobs.run([jobs.Job("v5e", "nowhere:fn")])


if __name__ == "__main__":
  absltest.main()
