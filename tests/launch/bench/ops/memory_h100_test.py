import shutil

from absl.testing import absltest
import pytest

from kernels_pallas.aot import topology
from launch.bench.ops import h100
from launch.bench.ops import memory_h100

needs_compiler = pytest.mark.skipif(
    not topology.has_toolchain("cuda") or shutil.which("ptxas") is None,
    reason="compiling for the H100 needs jax >= 0.11, jax-cuda13-plugin, ptxas",
)


class CasesTest(absltest.TestCase):

  def test_rooflines(self):
    cases = {case.name: case for case in memory_h100.cases()}
    # 4,096 slots of 8 heads of 128: keys and values, and 12 bytes beside them.
    num_bytes = 4096 * 8 * (2 * 2 * 128 + 12)
    kept = cases["decode C=4096 bfloat16"]
    self.assertAlmostEqual(kept.roofline_us, num_bytes / 3.35e6, delta=0.1)
    self.assertAlmostEqual(kept.of_peer, 1 / 8, places=3)
    self.assertEqual(cases["decode C=32768 bfloat16"].of_peer, 1)
    # 11 of 112 blocks; x and y are little.
    chosen = cases["llama3_8b_b16 at 10%"]
    self.assertAlmostEqual(chosen.of_peer, 11 / 112, delta=1e-3)
    self.assertAlmostEqual(cases["linear T=16384"].of_peer, 4, delta=0.1)

  def test_the_slope_of_linear_attention_is_1(self):
    self.assertAlmostEqual(memory_h100.slope(memory_h100.cases()), 1, places=1)

  def test_what_does_not_compile_is_a_row(self):
    case = memory_h100.cases()[0]
    rows = memory_h100.rows_of(case, {"error": "ValueError: no\nmore"})
    self.assertEqual([row["note"] for row in rows], ["ValueError: no"])
    self.assertIn("ValueError: no |", memory_h100.table(rows))


@needs_compiler
class CompiledTest(absltest.TestCase):

  @pytest.mark.slow
  def test_no_kernel_spills(self):
    sizes = {"capacities": (4096,), "mlps": ("opt_6.7b_b16",)}
    cases = memory_h100.cases(**sizes, lengths=(4096,))
    rows = memory_h100.measure(cases, num_workers=1)
    self.assertEqual({row["case"] for row in rows}, {x.name for x in cases})
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
