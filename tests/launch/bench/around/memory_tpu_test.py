from absl.testing import absltest
import pytest

from kernels_pallas.aot import chips
from kernels_pallas.aot import topology
from launch.bench.around import memory_tpu


class ProgramTest(absltest.TestCase):

  def test_arguments_are_query_key_value_and_the_cotangent(self):
    _, arguments = memory_tpu.both_passes(1024, 4, 2)
    self.assertEqual([x.shape[2] for x in arguments], [4, 2, 2, 4])


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_temporaries_are_smaller_than_the_arguments(self):
    (row,) = memory_tpu.measure(chips.get_chip("v5e"), [(4096, 8, 2)])
    # Two arrays of 8 heads and two of 2, 4,096 x 128 numbers of 2 bytes each.
    self.assertEqual(row["argument_mib"], 20)
    self.assertBetween(row["share"], 0.1, 1)
    self.assertEqual(row["share"], row["temp_mib"] / 20)


if __name__ == "__main__":
  absltest.main()
