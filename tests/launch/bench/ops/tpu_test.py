import sys

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from kernels_pallas.aot import chips
from kernels_pallas.aot import jobs
from kernels_pallas.aot import topology
from launch.bench.ops import compiled
from launch.bench.ops import programs
from launch.bench.ops import tpu

_V5E = chips.get_chip("v5e")


def _result(*issued, undecided=""):
  return {
      "kernels": [
          {
              "name": f"k.{i}",
              "chip": "v5e",
              "tree": {
                  "kind": "kernel",
                  "start": 0,
                  "bundles": 10,
                  "units": {"VSTORE:SPILL": 3},
                  "issued": n,
                  "regions": [],
              },
              "capacity": {"VSTORE:SPILL": 1},
              "vmem_bytes": 2**20,
              "num_steps": 4,
              "undecided": undecided,
          }
          for i, n in enumerate(issued)
      ],
      "fusion_cycles": 7,
      "temp_bytes": 2**21,
  }


def _row(result, **changes):
  (case,) = [
      case
      for case in tpu.dense_cases(4096, 1)
      if case.kernel == changes.get("kernel", "forward")
  ]
  job = jobs.Job("v5e", "nowhere:fn")
  return compiled.tpu_row(_V5E, case, job, result)[0]


class RowTest(parameterized.TestCase):

  def test_adds_up_the_kernels_of_a_forward_pass(self):
    row = _row(_result(1000, 500))
    self.assertEqual(row["static_bundles"], 1500)
    self.assertEqual(row["static_us"], 1.0)  # At 1.5 GHz.
    self.assertEqual((row["spills"], row["steps"], row["temp_mib"]), (6, 8, 2))
    # Half of the pairs and the diagonal: 4 H operations each, at 197e12.
    self.assertAlmostEqual(row["gflops"], 4 * 128 * 4096 * 4097 / 2 / 1e9)
    self.assertAlmostEqual(
        row["roofline_us"], row["gflops"] / 197e3 * 1e6, delta=0.1
    )
    self.assertEqual(row["shape"], "mha_4k")

  def test_a_step_that_is_one_core_s(self):
    """A sequence decodes on one core of two."""
    case, *_ = tpu.dense_cases(4096, 1)
    result = _result(1000)
    result["kernels"][0]["num_steps"] = 1
    job = jobs.Job("v4", "nowhere:fn")
    row, _ = compiled.tpu_row(chips.get_chip("v4"), case, job, result)
    self.assertEqual((row["steps"], row["per_step"]), (1, 1000))

  def test_of_a_backward_pass_the_last_kernel_counts(self):
    row = _row(_result(1000, 500), kernel="backward")
    self.assertEqual((row["static_bundles"], row["spills"]), (500, 3))

  def test_what_has_no_figure_says_why(self):
    failed = _row({"error": "OutOfVmem: vmem overflows: 20 bytes\nmore"})
    self.assertEqual(failed["note"], "OutOfVmem: vmem overflows: 20 bytes")
    unclear = _row(_result(0, undecided="branch on data"))
    self.assertEqual(unclear["note"], "branch on data")
    self.assertEqual(unclear["spills"], 3)
    for row in (failed, unclear):
      self.assertNotIn("static_bundles", row)
    with self.assertRaisesRegex(topology.ToolchainMissing, "no dumps"):
      _row({"missing": "no dumps"})

  def test_a_table_has_a_cell_for_each_column(self):
    rows = [_row(_result(1000)), _row({"error": "no"})]
    lines = tpu.table(rows).splitlines()
    self.assertLen(lines, 4)
    self.assertLen({line.count("|") for line in lines}, 1)
    self.assertIn("| 4 | 250 | 1,000 | 0.7 |", lines[2])


class SummaryTest(absltest.TestCase):

  def _rows(self, **bundles):
    return [
        {"length": 4096, "kernel": name, "static_bundles": n}
        for name, n in bundles.items()
    ]

  def test_compares_with_the_best_peer_of_the_kind(self):
    rows = self._rows(**{
        "forward": 90,
        "backward": 240,
        "forward + col_mass": 99,
        "jax flash 512": 120,
        "jax splash 1024": 100,
        "jax splash fused backward 512": 200,
    })
    rows.append({"length": 4096, "kernel": "jax flash 1024"})  # No figure.
    self.assertEqual(
        tpu.summary(rows),
        [
            "T=4,096: forward 0.90 of the best of jax's",
            "T=4,096: forward + col_mass 1.10 of our forward",
            "T=4,096: forward + col_mass 0.99 of the best of jax's",
            "T=4,096: backward 1.20 of jax's best fused backward",
        ],
    )

  def test_says_below_which_density_blocks_win(self):
    # 50 + 1000 d bundles against 650: as many at d = 0.6.
    rows = self._rows(**{
        "forward": 650,
        "block-sparse 512x512 10%": 150,
        "block-sparse 512x512 30%": 350,
    })
    (sentence,) = tpu.summary(rows)
    self.assertIn("blocks of 512x512 beat dense causal", sentence)
    self.assertIn("below 60% of its blocks", sentence)
    self.assertIn("take 4.3x fewer", sentence)


class CasesTest(absltest.TestCase):

  def test_programs_exist_and_rows_have_names_of_their_own(self):
    cases = tpu.dense_cases(1024, 2)
    cases += tpu.sparse_cases(2048, 2, [(512, 512)])
    names = {(case.facts["length"], case.kernel) for case in cases}
    self.assertLen(names, len(cases))
    for case in cases:
      fn, arguments = case.program(**case.options)
      self.assertTrue(callable(fn))
      # Another process finds the program by its name.
      module, _, name = compiled.job_of(
          "v5e", case.program, {}
      ).program.partition(":")
      self.assertIs(getattr(sys.modules[module], name), case.program)
      heads = 2 * case.facts["length"] * programs.HEAD_DIM
      self.assertEqual({x.size for x in arguments}, {heads})

  def test_work_of_a_selection_is_that_of_its_tiles(self):
    cases = tpu.sparse_cases(4096, 1, [(512, 512)])
    work = {case.kernel: case.work.flops for case in cases}
    selection = programs.random_selection(4096, 1, 512, 512, 0.1)
    tiles = int(selection.num_valid.sum())
    self.assertEqual(
        work["block-sparse 512x512 10%"], 4 * 128 * 512 * 512 * tiles
    )
    self.assertEqual(
        work["block-sparse 512x512 10% backward"],
        10 * 128 * 512 * 512 * tiles,
    )


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_ours_are_at_most_as_long_as_the_best_peer(self):
    rows = tpu.measure(_V5E, [4096], 4096, [(512, 512)])
    self.assertEqual({row["note"] for row in rows}, {""})
    found = {row["kernel"]: row["static_bundles"] for row in reversed(rows)}
    peers = {name: n for name, n in found.items() if name.startswith("jax")}
    backward = [n for name, n in peers.items() if "backward" in name]
    forward = [n for name, n in peers.items() if "backward" not in name]
    self.assertLess(found["forward"], min(forward))
    self.assertLess(found["backward"], min(backward))
    self.assertLess(found["block-sparse 512x512 10%"], found["forward"] / 2)


class LinearTest(absltest.TestCase):

  def test_the_crossing_is_on_the_line_between_two_lengths(self):
    crossing = tpu.crossing
    self.assertEndsWith(crossing([(256, 1.2), (512, 0.8)]), "from T=384 on")
    self.assertEndsWith(crossing([(256, 0.9)]), "at T=256 and above")
    self.assertEndsWith(crossing([(256, 3.0), (512, 2.0)]), "up to T=512")

  def test_beside_dense_attention(self):
    dense, linear = tpu.linear_cases(1024, _V5E)
    self.assertEqual(
        (dense.program, linear.program), (programs.forward, programs.linear)
    )
    rows = [
        {"length": 512, "kernel": "forward", "static_bundles": 100},
        {"length": 512, "kernel": "linear attention", "static_bundles": 50},
    ]
    self.assertEqual(
        tpu.summary(rows),
        [
            (
                "T=512: linear attention 0.50 of our dense forward, 0.10"
                " bundles a position"
            ),
            (
                "linear attention takes fewer bundles than dense at T=512 and"
                " above"
            ),
        ],
    )


if __name__ == "__main__":
  absltest.main()
