from absl.testing import absltest
from absl.testing import parameterized

from kernels_pallas.aot import scalars

_MINUS_ONE = 2**32 - 1


class ParseTest(parameterized.TestCase):

  @parameterized.parameters(
      (
          "%s53_s27 = sadd.s32 1, %s9625_s23 /* a ;; b */",
          ("s53", "sadd.s32", "", "", ("1", "%s9625_s23"), None),
      ),
      (
          "%s18_s28 = smov (!%p54_p0, %s56_s28), %s9_s24",
          ("s18", "smov", "!%p54_p0", "%s56_s28", ("%s9_s24",), None),
      ),
      (
          "%22 = sst [smem:[#allocation1_spill]] %s7_s0",
          (
              "22",
              "sst",
              "",
              "",
              ("[smem:[#allocation1_spill]]", "%s7_s0"),
              None,
          ),
      ),
      (
          "%22 = sst [smem:[#allocation5]] (%p8_p0), %s7_s0",
          (
              "22",
              "sst",
              "%p8_p0",
              "",
              ("[smem:[#allocation5]]", "%s7_s0"),
              None,
          ),
      ),
      (
          "%40 = sbr.rel (!%p38_p2) target = $region127",
          ("40", "sbr.rel", "!%p38_p2", "", (), 127),
      ),
      (
          "%s1_s2 = int_to_ptr.hbm [resolvable:$true] %s3_s2",
          ("s1", "int_to_ptr.hbm", "", "", ("%s3_s2",), None),
      ),
      (
          (
              "%9 = dma.hbm_to_smem (!%p3_p1), /*hbm=*/%s4_s1,"
              " /*size_in_granules=*/16, /*smem=*/[#allocation3],"
              " /*dst_syncflagno=*/%s5_s2 /* \\nstrides: (1, 1) */"
          ),
          (
              *("9", "dma.hbm_to_smem", "!%p3_p1", ""),
              ("%s4_s1", "16", "[#allocation3]", "%s5_s2"),
              None,
          ),
      ),
  )
  def test_reads_an_instruction(self, text, expected):
    vector = "%v1_v0 = vadd.f32 %v2_v1, %v3_v2"
    found = scalars.parse(f" {vector} ;; {text} ;; %3 = vst [vmem:[%s1]] }}")
    self.assertEqual(found, [scalars.Instruction(*expected)])

  def test_says_what_it_reads(self):
    (found,) = scalars.parse("%s1_s1 = smov (!%p2_p0, %s3_s1), %s4_s2 }")
    self.assertEqual(found.reads, {"p2", "s3", "s4"})


class OperationsTest(parameterized.TestCase):

  @parameterized.parameters(
      ("sadd.s32", (3, _MINUS_ONE), 2),
      ("ssub.s32", (2, 3), _MINUS_ONE),
      ("sshra.s32", (_MINUS_ONE - 7, 2), _MINUS_ONE - 1),
      ("sshrl.u32", (_MINUS_ONE, 31), 1),
      ("sshll.u32", (_MINUS_ONE, 31), 2**31),
      ("scmp.lt.s32.totalorder", (_MINUS_ONE, 0), True),
      ("scmp.lt.u32.totalorder", (_MINUS_ONE, 0), False),
      ("smin.s32", (_MINUS_ONE, 0), _MINUS_ONE),
      ("smin.u32", (_MINUS_ONE, 0), 0),
      ("scalar_lea.vmem", (8, 4), 12),
      ("scalar_select", (False, 8, 4), 4),
      ("pnand", (True, False), True),
      ("pxor", (True, True), False),
      ("sdivrem.u32", (23, 5), [4, 3]),
      # 23 / 5 by the reciprocal, as compilers divide.
      ("smulhi.u32", (23, 0xCCCCCCCD), 4 << 2 | 2),
  )
  def test_are_those_of_32_bits(self, name, arguments, expected):
    self.assertEqual(scalars.operation(name)(*arguments), expected)

  @parameterized.parameters(
      ("sadd.s32", (1, scalars.UNKNOWN), scalars.UNKNOWN),
      ("scmp.eq.s32.totalorder", (scalars.UNKNOWN, 1), scalars.UNKNOWN),
      ("pand", (scalars.UNKNOWN, False), False),
      ("por", (True, scalars.UNKNOWN), True),
      ("por", (False, scalars.UNKNOWN), scalars.UNKNOWN),
      ("pneg", (scalars.UNKNOWN,), scalars.UNKNOWN),
      ("scalar_select", (scalars.UNKNOWN, 1, 2), scalars.UNKNOWN),
  )
  def test_know_what_follows_from_the_rest(self, name, arguments, expected):
    self.assertIs(scalars.operation(name)(*arguments), expected)

  def test_vectors_are_none_of_them(self):
    self.assertIsNone(scalars.operation("vadd.f32"))


if __name__ == "__main__":
  absltest.main()
