from absl.testing import absltest
import pytest

from launch.bench.ops import compiled
from launch.bench.recurrent import delta


class RowsTest(absltest.TestCase):

  @pytest.mark.slow
  def test_of_a_cpu(self):
    rows = list(delta.cpu_rows(128, num_times=1))
    self.assertEqual(
        [row["what"] for row in rows], ["delta", "delta by channel"]
    )
    for row in rows:
      self.assertGreater(row["by_loop"], 0)
      # A loop by positions keeps a state of each for its backward.
      self.assertGreater(row["loop_temp_mib"], 128 * 8 * 128**2 * 4 / 2**20)
      self.assertLess(row["ours_temp_mib"], row["loop_temp_mib"])

  def test_crossings_are_those_of_the_same_pass(self):
    bundles = {
        ("delta", 1024): 300,
        ("delta", 4096): 1200,
        ("delta backward", 1024): 50,
        ("forward", 1024): 100,
        ("forward", 4096): 1600,
        ("backward", 1024): 100,
    }
    rows = [
        {"kernel": kernel, "length": length, "static_bundles": n}
        for (kernel, length), n in bundles.items()
    ]
    self.assertEqual(
        delta.crossings(rows),
        [
            "T=1,024: delta 3.00 of our dense forward",
            "T=4,096: delta 0.75 of our dense forward",
            "delta takes fewer bundles than dense from T=3,755 on",
            "T=1,024: delta backward 0.50 of our dense backward",
            (
                "delta backward takes fewer bundles than dense at T=1,024 and"
                " above"
            ),
        ],
    )

  def test_a_target_that_it_does_not_know(self):
    for target in ("gpu", "tpu:v9"):
      with self.assertRaisesRegex(ValueError, f"and h100, not {target}"):
        delta.report(target, [1024])

  def test_a_case_is_built_by_its_name(self):
    case, *_ = delta._cases([128], 2, "pallas_tpu")
    job = compiled.job_of("v5e", case.program, case.options)
    self.assertEqual(job.program, "launch.bench.recurrent.delta:delta")
    call, arrays = delta.delta(**job.kwargs)
    self.assertTrue(callable(call))
    self.assertEqual(arrays[0].shape, (1, 128, 2, 128))


if __name__ == "__main__":
  absltest.main()
