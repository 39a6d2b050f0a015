from absl.testing import absltest
from absl.testing import parameterized

from kernels_pallas.aot import overflow

_MIB = 2**20


class ParseTest(parameterized.TestCase):

  # Messages of libtpu 0.0.42 and Mosaic GPU of jax 0.11.2, cut.
  @parameterized.parameters(
      (
          (
              "Allocation (size=2097152) would exceed memory (size=1048576) ::"
              " #allocation3 [shape = 'u8[2097152]{0}', space=smem, size = 0x2"
          ),
          overflow.OutOfSmem,
          2 * _MIB,
          _MIB,
      ),
      (
          (
              "Ran out of memory in memory space smem. Used 1.00M of 1.00M"
              " smem. Exceeded smem capacity by 144B.\n\nProgram smem"
              " requirement"
          ),
          overflow.OutOfSmem,
          _MIB + 144,
          _MIB,
      ),
      (
          (
              "Ran out of memory in memory space vmem while allocating on stack"
              " for %f.1 = f32[8]{0} custom-call(%x). Scoped allocation with"
              " size 20.00M and limit 16.00M exceeded scoped vmem limit by"
              " 4.00M. It"
          ),
          overflow.OutOfVmem,
          20 * _MIB,
          16 * _MIB,
      ),
      (
          (
              "Ran out of memory in memory space hbm. Used 20.5G of 16.0G hbm."
              " Exceeded hbm capacity by 4.50G."
          ),
          overflow.OutOfHbm,
          20.5 * 1024 * _MIB,
          16 * 1024 * _MIB,
      ),
      (
          (
              "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory"
              " required for HLO temporaries (37.82G) exceeds available HBM"
              " (31.25G)."
          ),
          overflow.OutOfHbm,
          round(37.82 * 1024 * _MIB),
          31.25 * 1024 * _MIB,
      ),
      (
          (
              "kernel exceeds available shared memory: smem_bytes=297112 >"
              " max_smem_bytes=232448"
          ),
          overflow.OutOfSmem,
          297112,
          232448,
      ),
  )
  def test_reads_the_figures(self, message, kind, used, limit):
    error = overflow.parse(message)
    self.assertIs(type(error), kind)
    self.assertEqual((error.used_bytes, error.limit_bytes), (used, limit))

  def test_other_failures_stay_what_they_are(self):
    with self.assertRaisesRegex(ValueError, "^divisible by 8$"):
      with overflow.explained():
        raise ValueError("divisible by 8")


if __name__ == "__main__":
  absltest.main()
