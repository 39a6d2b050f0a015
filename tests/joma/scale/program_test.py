from absl.testing import absltest
from absl.testing import parameterized

from joma.scale import program as program_lib

# A loop of 6, another from 2 to 5 whose bounds its start has, and one whose
# length is computed.
TEXT = """HloModule jit_f, is_scheduled=true

%body.1 (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %y = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} add(%x, %x)
  ROOT %t = (s32[], bf16[8,128]{1,0}) tuple(%x, %y)
}
%cond.1 (q: (s32[], bf16[8,128])) -> pred[] {
  %six = s32[] constant(6)
  %q = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  ROOT %lt = pred[] compare(%i, %six), direction=LT, metadata={op_name="a
    b (c)" source_line=3}
}
%inner_compare (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt.2 = pred[] compare(%b, %a), direction=LT
}
%cond.2 (r: (s32[], s32[], bf16[8,128])) -> pred[] {
  %r = (s32[], s32[], bf16[8,128]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%r), index=0
  %n = s32[] get-tuple-element(%r), index=1
  ROOT %f = pred[] fusion(%n, %j), kind=kLoop, calls=%inner_compare
}
ENTRY %main (x.1: bf16[8,128], n.1: s32[]) -> bf16[8,128] {
  %x.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %n.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %two = s32[] constant(2)
  %five = s32[] constant(5)
  %start = (s32[], bf16[8,128]{1,0}) tuple(%zero, %x.1)
  %while.1 = (s32[], bf16[8,128]{1,0}) while(%start),
    condition=%cond.1, body=%body.1
  %kept = s32[] copy(%two)
  %start.2 = (s32[], s32[], bf16[8,128]{1,0}) tuple(%kept, %five, %x.1)
  %while.2 = (s32[], s32[], bf16[8,128]{1,0}) while(%start.2),
    condition=%cond.2, body=%body.1
  %start.3 = (s32[], s32[], bf16[8,128]{1,0}) tuple(%zero, %n.1, %x.1)
  %while.3 = (s32[], s32[], bf16[8,128]{1,0}) while(%start.3),
    condition=%cond.2, body=%body.1
  ROOT %out = bf16[8,128]{1,0} get-tuple-element(%while.1), index=1
}
"""


class ProgramTest(parameterized.TestCase):

  def test_loops_run_as_often_as_their_conditions_say(self):
    program = program_lib.parse(TEXT)
    self.assertEqual(program.entry, "main")
    runs, unknown = program_lib.runs(program)
    adds = [run.times for run in runs if run.instruction.opcode == "add"]
    # Of the third one nothing is known: its body counts once.
    self.assertEqual(adds, [6, 3, 1])
    self.assertEqual(unknown, ["while.3"])

  def test_an_instruction_is_taken_apart(self):
    program = program_lib.parse(TEXT)
    compare = program.computations["cond.1"]["lt"]
    self.assertEqual(compare.opcode, "compare")
    self.assertEqual(compare.operands, ("i", "six"))
    self.assertIn("source_line=3", compare.attributes)
    self.assertTrue(compare.is_root)
    loop = program.computations["main"]["while.1"]
    self.assertEqual(loop.called("body"), "body.1")

  @parameterized.parameters(
      ("bf16[8,128]{1,0:T(8,128)(2,1)}", [(8, 128)], [2048], [True]),
      ("f32[]{:T(128)}", [()], [4], [True]),
      ("pred[3]{0:T(512)S(1)}", [(3,)], [3], [False]),
      ("(s4[16]{0}, u32[2]{0:S(4)})", [(16,), (2,)], [8, 8], [True, False]),
  )
  def test_a_shape_has_bytes_and_a_place(self, shape, dims, sizes, places):
    found = program_lib.arrays_of(shape)
    self.assertEqual([array.dims for array in found], dims)
    self.assertEqual([array.num_bytes for array in found], sizes)
    self.assertEqual([array.is_in_hbm for array in found], places)

  def test_a_text_without_entry_is_refused(self):
    with self.assertRaisesRegex(ValueError, "no entry"):
      program_lib.parse("HloModule x\n")


if __name__ == "__main__":
  absltest.main()
