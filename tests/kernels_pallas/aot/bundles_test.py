import dataclasses
import json

from absl.testing import absltest
import numpy as np

from kernels_pallas.aot import bundles

# ruff: noqa: E501
# A grid loop; in it a guard around a loop, and a branch. With one delay slot,
# after libtpu 0.0.42's for v4, shortened.
_BUNDLES = """= control target key start
LH: loop header
PF: predicated region fallthrough
= control target key end
     0   :  { %s0 = inlined_call_operand.hbm [shape: f32[8], index: 0] }
   0x1   :  { %8 = vsyncpa [#allocation6], 0 } /* Start region 1 */
   0x2 LB: > { %s9 = sphi %s8, %s7 } /* Start region 179 :: Start region 3 */
   0x3   : > { %8254 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s257_s8
base_bounds: (1, 8, 512, 1)
second_minor_factor: 1 */ } /* End region 3 */
   0x4   : > { %s1 = sadd.s32 1  ;;  %29 = sbr.rel (%p6_p4) target = $region140 } /* Start region 139 */
   0x5   :  {} /* End region 141 */
   0x6 LB: >> { %v1_v0 = vld [vmem:[%s97 + $0x70] sm:$0xff] } /* Start region 146 */
   0x7   : >> { %v2 = vadd.f32 %v1, %v1 }
   0x8   : > { %4002 = sbr.rel (!%p40_p14) target = $region146 }
   0x9   : >> { %5 = vst [vmem:[#allocation3]] } /* End region 146 */
   0xa PF: > { %s12 = smov 0 } /* Start/End empty region 140 :: Start region 163 */
   0xb   : > { %37 = sbr.rel (%p68_p13) target = $region84 } /* Start region 83 */
   0xc   :  {}
   0xd   : > { %6 = vst [vmem:[%s10]] }
   0xe   : > { %7 = vst [vmem:[%s10 + $0x8]] }
   0xf PF: > { %41 = sbr.rel (!%p125) target = $region179  } /* Start/End empty region 84 */
  0x10   :  {} /* End region 178 */
  0x11 PF:  {} /* exit bundle: %mine.1 = custom-call(%x) */
"""
_UNITS = """== CAPACTIY:
VLOAD, VSTORE, VSTORE:SPILL
    3     1     1
== UTILIZATION:
""" + "\n".join(
    f"{int(i == 6)} {int(i in (9, 13, 14))} {int(i == 0)}" for i in range(18)
)


def _outline(region):
  return (
      region.kind,
      region.start,
      region.bundles,
      *map(_outline, region.regions),
  )


class ParseTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.capacity, self.units = bundles.parse_units(_UNITS)
    self.code = bundles.parse_code(_BUNDLES)
    self.tree = bundles.make_tree(self.code, self.units, branch_delay=1)

  def test_units(self):
    self.assertEqual(
        self.capacity, {"VLOAD": 3, "VSTORE": 1, "VSTORE:SPILL": 1}
    )
    np.testing.assert_array_equal(
        np.flatnonzero(self.units["VSTORE"]), [9, 13, 14]
    )

  def test_loops_and_branches_nest_and_count_what_is_theirs(self):
    # 18 bundles: before the grid loop 2, after it 1. The loop is 2..16, of
    # which the guard skips 6..9, all of it the inner loop, and the last branch
    # 13..14.
    guarded = ("branch", 6, 0, ("loop", 6, 4))
    loop = ("loop", 2, 15 - 4 - 2, guarded, ("branch", 13, 2))
    self.assertEqual(_outline(self.tree), ("kernel", 0, 3, loop))
    self.assertEqual(self.tree.total_bundles, 18)

  def test_work_is_that_of_the_own_bundles(self):
    _, grid, guard, inner, flush = self.tree.walk()
    none = {"VLOAD": 0, "VSTORE": 0, "VSTORE:SPILL": 0}
    self.assertEqual(grid.units, none)
    self.assertEqual(guard.units, none)
    self.assertEqual(inner.units, none | {"VLOAD": 1, "VSTORE": 1})
    self.assertEqual(flush.units, none | {"VSTORE": 2})
    self.assertEqual(self.tree.units, none | {"VSTORE:SPILL": 1})

  def test_delay_slots_are_not_skipped(self):
    tree = bundles.make_tree(self.code, self.units, branch_delay=0)
    branches = [r for r in tree.walk() if r.kind == "branch"]
    self.assertEqual([r.start for r in branches], [5, 12])
    self.assertEqual([r.total_bundles for r in branches], [5, 3])
    self.assertEqual(tree.total_bundles, 18)

  def test_what_is_issued_is_summed_over_the_own_bundles(self):
    # The grid loop runs 10 times, its inner loop 20 times, the flush never.
    issued = np.array([1, 1] + 4 * [10] + 4 * [20] + 3 * [10] + 2 * [0])
    issued = np.concatenate([issued, [10, 10, 1]])
    tree = bundles.make_tree(self.code, self.units, 1, issued)
    found = [region.issued for region in tree.walk()]
    self.assertEqual(found, [3, 90, 0, 80, 0])
    self.assertEqual(sum(found), issued.sum())

  def test_survives_json(self):
    text = json.dumps(dataclasses.asdict(self.tree))
    self.assertEqual(bundles.Region.from_json(json.loads(text)), self.tree)


if __name__ == "__main__":
  absltest.main()
