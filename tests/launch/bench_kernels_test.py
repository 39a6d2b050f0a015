import importlib.util

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from kernels_pallas.aot import bundles
from launch import bench_kernels
from scansnap_jax.experiment import errors


def _region(kind, num, *inner):
  return bundles.Region(
      kind=kind, start=0, bundles=num, units={}, regions=inner
  )


class RunsTest(parameterized.TestCase):

  def test_loops_of_a_causal_forward(self):
    # 4 rows of tiles: 6 whole tiles, 4 on the diagonal, 10 weighted.
    grid = _region(
        "loop",
        5,
        _region("branch", 1, _region("loop", 9)),
        _region("branch", 1, _region("loop", 8)),
        _region("loop", 7),
    )
    found = bench_kernels.runs(_region("kernel", 3, grid), "forward", 4)
    self.assertEqual(found, [4, 4, 6, 4, 4, 10])

  def test_a_peer_visits_tiles_and_steps_over_the_rest(self):
    grid = _region("loop", 5, *(_region("branch", n) for n in (2, 90, 4)))
    found = bench_kernels.runs(_region("kernel", 3, grid), "jax flash 512", 4)
    self.assertEqual(found, [16, 16, 10, 4])


class MeasureTest(parameterized.TestCase):

  @parameterized.parameters("gpu", "tpu:v9", "v5e")
  def test_an_unknown_target_is_named(self, target):
    with self.assertRaisesRegex(errors.UserError, target.split(":")[-1]):
      bench_kernels.measure(target, [1024])

  @pytest.mark.slow
  def test_ours_are_at_most_as_long_as_the_best_peer(self):
    if importlib.util.find_spec("libtpu") is None:
      self.skipTest("libtpu is not installed")
    rows = bench_kernels.measure("tpu:v5e", [4096])
    found = {row["kernel"]: row["static_bundles"] for row in rows}
    peers = {name: n for name, n in found.items() if name.startswith("jax")}
    backward = [n for name, n in peers.items() if "backward" in name]
    forward = [n for name, n in peers.items() if "backward" not in name]
    self.assertLess(found["forward"], min(forward))
    self.assertLess(found["forward + backward"], min(backward))


if __name__ == "__main__":
  absltest.main()
