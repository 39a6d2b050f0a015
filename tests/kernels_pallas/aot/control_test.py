from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from kernels_pallas.aot import bundles
from kernels_pallas.aot import chips
from kernels_pallas.aot import control

# ruff: noqa: E501
# One word of a table a step says how often the inner loop runs; four bundles
# after a branch are executed whether it is taken or not.
_CODE = """
     0   :  { %s1_s0 = inlined_call_operand.hbm [shape: s32[3,1], index: 2, kind: input, shape index: {}] ;;  %s2_s9 = smov 0 }
   0x1 LB: > { %s3_s2 = sphi %s2_s9, %s4_s2 } /* Start region 7 */
   0x2   : > { %s5_s3 = scalar_lea.hbm %s1_s0, %s3_s2 }
   0x3   : > { %s6_s3 = sshll.u32 %s5_s3, 4 }
   0x4   : > { %9 = dma.hbm_to_smem (!%p9_p9), /*hbm=*/%s6_s3, /*size_in_granules=*/16, /*smem=*/[#allocation3], /*dst_syncflagno=*/%s8_s8 }
   0x5   : > { %s7_s4 = sld [smem:[#allocation3 + $0x1]] ;;  %s8_s5 = smov 0 }
   0x6   : > { %p1_p0 = scmp.le.s32.totalorder %s7_s4, 0 }
   0x7   : > { %10 = sbr.rel (%p1_p0) target = $region9 }
   0x8   :  {}
   0x9   :  {}
   0xa   :  {}
   0xb   :  {}
   0xc LB: >> { %s9_s6 = sphi %s8_s5, %s10_s6 } /* Start region 8 */
   0xd   : >> { %s10_s6 = sadd.s32 1, %s9_s6 ;;  %v1_v0 = vadd.f32 %v1, %v1 }
   0xe   : >> { %p2_p1 = scmp.ge.s32.totalorder %s10_s6, %s7_s4 }
   0xf   : >> { %11 = sbr.rel (!%p2_p1) target = $region8 }
  0x10   :  {}
  0x11   :  {}
  0x12   :  {}
  0x13   :  {}
  0x14 PF: > { %s4_s2 = sadd.s32 1, %s3_s2 } /* Start/End empty region 9 */
  0x15   : > { %p3_p2 = scmp.ge.s32.totalorder %s4_s2, 3 }
  0x16   : > { %12 = sbr.rel (!%p3_p2) target = $region7 }
  0x17   :  {}
  0x18   :  {}
  0x19   :  {}
  0x1a   :  {}
  0x1b   :  { %s20_s1 = vend }
"""
_V5E = chips.get_chip("v5e")


def _table(runs):
  words = np.zeros((len(runs), 128), np.int32)
  words[:, 1] = runs
  return {2: words.ravel()}


class CountTest(parameterized.TestCase):

  @parameterized.parameters((4, 0, 2), (1, 1, 1), (0, 0, 0))
  def test_follows_the_table(self, *runs):
    code = bundles.parse_code(_CODE)
    found = control.count(code, _V5E, _table(runs))
    expected = [1] + 11 * [3] + 8 * [sum(runs)] + 7 * [3] + [1]
    np.testing.assert_array_equal(found, expected)

  def test_a_table_that_is_not_known_decides_nothing(self):
    with self.assertRaisesRegex(control.Undecided, "region 9 on %p1_p0"):
      control.count(bundles.parse_code(_CODE), _V5E, {})

  def test_what_is_not_understood_is_named(self):
    code = _CODE.replace("smov 0 }\n   0x1", "snew.u32 0 }\n   0x1")
    with self.assertRaisesRegex(control.Undecided, "understood: snew.u32"):
      control.count(bundles.parse_code(code), _V5E, _table((1, 1, 1)))

  def test_a_loop_without_end_is_left(self):
    endless = _CODE.replace("sadd.s32 1, %s3_s2", "smov %s3_s2")
    with mock.patch.object(control, "_MAX_STEPS", 1000):
      with self.assertRaisesRegex(control.Undecided, "no end after 1000"):
        control.count(bundles.parse_code(endless), _V5E, _table((1, 1, 1)))

  def test_a_branch_behind_one_that_is_taken_does_nothing(self):
    # Its predicate was to be made by what is skipped.
    code = """
     0   :  { %p1_p0 = scmp.eq.s32.totalorder 1, 1 }
   0x1   :  { %2 = sbr.rel (%p1_p0) target = $region4 }
   0x2   :  { %p2_p1 = scmp.eq.s32.totalorder (!%p1_p0), 1, 1 }
   0x3   :  { %3 = sbr.rel (%p2_p1) target = $region5 }
   0x4   :  {}
   0x5   :  {}
   0x6   :  {}
   0x7   :  {} /* Start region 5 */
   0x8   :  { %s2_s1 = vend } /* Start region 4 */
"""
    found = control.count(bundles.parse_code(code), _V5E, {})
    self.assertEqual(list(found), 6 * [1] + [0, 0, 1])

  def test_one_number_is_passed_in_a_register(self):
    code = """
     0   :  { %s1_s0 = inlined_call_operand.<no memory space> [shape: s32[1], index: 0, kind: input, shape index: {}] }
   0x1   :  { %p1_p0 = scmp.ne.s32.totalorder %s1_s0, 0 }
   0x2   :  { %3 = sbr.rel (%p1_p0) target = $region4 }
   0x3   :  {}
   0x4   :  {}
   0x5   :  { %s2_s1 = vend } /* Start region 4 */
"""
    parsed = bundles.parse_code(code)
    for number, expected in ((0, 1), (7, 0)):
      operands = {0: np.full(128, number, np.int32)}
      found = control.count(parsed, chips.get_chip("v4"), operands)
      self.assertEqual(list(found), [1, 1, 1, 1, expected, 1])
    with self.assertRaises(control.Undecided):
      control.count(parsed, chips.get_chip("v4"), {})

  @parameterized.parameters("core id", "megacore core id :: core id")
  def test_each_core_has_its_number(self, comment):
    code = """
     0   :  { %s1_s0 = sld [smem:[#allocation0]] /* core id */ }
   0x1   :  { %p1_p0 = scmp.ne.s32.totalorder %s1_s0, 0 }
   0x2   :  { %3 = sbr.rel (%p1_p0) target = $region4 }
   0x3   :  {}
   0x4   :  {}
   0x5   :  { %s2_s1 = vend } /* Start region 4 */
"""
    for core, expected in ((0, 1), (1, 0)):
      text = code.replace("core id", comment)
      found = control.count(
          bundles.parse_code(text), chips.get_chip("v4"), {}, core
      )
      self.assertEqual(list(found), [1, 1, 1, 1, expected, 1])


if __name__ == "__main__":
  absltest.main()
