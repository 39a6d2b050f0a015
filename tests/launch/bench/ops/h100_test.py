import shutil

from absl.testing import absltest
import pytest

from kernels_pallas.aot import topology
from launch.bench.ops import compiled
from launch.bench.ops import h100

needs_compiler = pytest.mark.skipif(
    not topology.has_toolchain("cuda") or shutil.which("ptxas") is None,
    reason="compiling for the H100 needs jax >= 0.11, jax-cuda13-plugin, ptxas",
)


class CasesTest(absltest.TestCase):

  def test_rooflines(self):
    groups = (h100.decode_cases(), h100.mlp_cases(), h100.linear_cases())
    cases = {case.kernel: case.facts for group in groups for case in group}
    # 4,096 slots of 8 heads of 128: keys and values, and 12 bytes beside them.
    num_bytes = 4096 * 8 * (2 * 2 * 128 + 12)
    kept = cases["decode C=4096 bfloat16"]
    self.assertAlmostEqual(kept["roofline_us"], num_bytes / 3.35e6, delta=0.1)
    self.assertAlmostEqual(kept["of_peer"], 1 / 8, places=3)
    self.assertEqual(cases["decode C=32768 bfloat16"]["of_peer"], 1)
    # 11 of 112 blocks; x and y are little.
    chosen = cases["llama3_8b_b16 at 10%"]
    self.assertAlmostEqual(chosen["of_peer"], 11 / 112, delta=1e-3)
    self.assertAlmostEqual(cases["linear T=16384"]["of_peer"], 4, delta=0.1)

  def test_the_slope_of_linear_attention_is_1(self):
    self.assertAlmostEqual(h100.slope(h100.linear_cases()), 1, places=1)

  def test_what_does_not_compile_is_a_row(self):
    case = h100.decode_cases()[0]
    job = compiled.job_of("h100", case.program, case.options)
    rows = compiled.h100_rows_of(case, job, {"error": "ValueError: no\nmore"})
    self.assertEqual([row["note"] for row in rows], ["ValueError: no"])
    self.assertIn("ValueError: no |", h100.table(rows))


@needs_compiler
class CompiledTest(absltest.TestCase):

  @pytest.mark.slow
  def test_no_kernel_spills(self):
    cases = h100.decode_cases((4096,)) + h100.mlp_cases(("opt_6.7b_b16",))
    cases += h100.linear_cases((4096,))
    rows = compiled.h100_rows(cases, num_workers=1)
    self.assertEqual({row["case"] for row in rows}, {x.kernel for x in cases})
    for row in rows:
      self.assertEqual((row["spilled_bytes"], row["note"]), (0, ""), row)
    # Nothing of the cache is copied: of int8, 8 MiB.
    decode = [row for row in rows if row["kernel"] == "heavy_hitter_decode"]
    self.assertLen(decode, 2)
    self.assertLess(max(row["temp_mib"] for row in decode), 2)

  def test_without_ops_nothing_is_compiled(self):
    self.assertEqual(h100.report(ops=()), [])


if __name__ == "__main__":
  absltest.main()
