from absl.testing import absltest
from absl.testing import parameterized

from joma.scale import program as program_lib

# A loop of 6, another from 2 to 5 whose bounds its start has, one whose length
# is computed, one from 0 to 5 by twos, and one whose counter is multiplied.
TEXT = """HloModule jit_f, is_scheduled=true

%body.1 (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %y = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} negate(%x)
  %k = s32[]{:T(128)} get-tuple-element(%p), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%k, %one)
  ROOT %t = (s32[], bf16[8,128]{1,0}) tuple(%next, %y)
}
%inner_add (c: s32[], d: s32[]) -> s32[] {
  %c = s32[] parameter(0)
  %d = s32[] parameter(1)
  ROOT %sum = s32[] add(%d, %c)
}
%body.2 (p.2: (s32[], s32[], bf16[8,128])) -> (s32[], s32[], bf16[8,128]) {
  %p.2 = (s32[], s32[], bf16[8,128]{1,0}) parameter(0)
  %k.2 = s32[] get-tuple-element(%p.2), index=0
  %copied = s32[] copy(%k.2)
  %n.2 = s32[] get-tuple-element(%p.2), index=1
  %x.2 = bf16[8,128]{1,0} get-tuple-element(%p.2), index=2
  %y.2 = bf16[8,128]{1,0} negate(%x.2)
  %two.2 = s32[] constant(2)
  %next.2 = s32[] fusion(%two.2, %copied), kind=kLoop, calls=%inner_add
  ROOT %t.2 = (s32[], s32[], bf16[8,128]{1,0}) tuple(%next.2, %n.2, %y.2)
}
%body.3 (p.3: (s32[], s32[], bf16[8,128])) -> (s32[], s32[], bf16[8,128]) {
  %p.3 = (s32[], s32[], bf16[8,128]{1,0}) parameter(0)
  %k.3 = s32[] get-tuple-element(%p.3), index=0
  %n.3 = s32[] get-tuple-element(%p.3), index=1
  %x.3 = bf16[8,128]{1,0} get-tuple-element(%p.3), index=2
  %y.3 = bf16[8,128]{1,0} negate(%x.3)
  %one.3 = s32[] constant(1)
  %next.3 = s32[] add(%one.3, %k.3)
  ROOT %t.3 = (s32[], s32[], bf16[8,128]{1,0}) tuple(%next.3, %n.3, %y.3)
}
%body.5 (p.5: (s32[], s32[], bf16[8,128])) -> (s32[], s32[], bf16[8,128]) {
  %p.5 = (s32[], s32[], bf16[8,128]{1,0}) parameter(0)
  %k.5 = s32[] get-tuple-element(%p.5), index=0
  %n.5 = s32[] get-tuple-element(%p.5), index=1
  %x.5 = bf16[8,128]{1,0} get-tuple-element(%p.5), index=2
  %y.5 = bf16[8,128]{1,0} negate(%x.5)
  %next.5 = s32[] multiply(%n.5, %k.5)
  ROOT %t.5 = (s32[], s32[], bf16[8,128]{1,0}) tuple(%next.5, %n.5, %y.5)
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
    condition=%cond.2, body=%body.3
  %start.3 = (s32[], s32[], bf16[8,128]{1,0}) tuple(%zero, %n.1, %x.1)
  %while.3 = (s32[], s32[], bf16[8,128]{1,0}) while(%start.3),
    condition=%cond.2, body=%body.3
  %start.4 = (s32[], s32[], bf16[8,128]{1,0}) tuple(%zero, %five, %x.1)
  %while.4 = (s32[], s32[], bf16[8,128]{1,0}) while(%start.4),
    condition=%cond.2, body=%body.2
  %start.5 = (s32[], s32[], bf16[8,128]{1,0}) tuple(%zero, %five, %x.1)
  %while.5 = (s32[], s32[], bf16[8,128]{1,0}) while(%start.5),
    condition=%cond.2, body=%body.5
  ROOT %out = bf16[8,128]{1,0} get-tuple-element(%while.1), index=1
}
"""


class ProgramTest(parameterized.TestCase):

  def test_loops_run_as_often_as_their_conditions_say(self):
    program = program_lib.parse(TEXT)
    self.assertEqual(program.entry, "main")
    runs, unknown = program_lib.runs(program)
    times = [run.times for run in runs if run.instruction.opcode == "negate"]
    # Of the third and the fifth nothing is known: their bodies count once.
    self.assertEqual(times, [6, 3, 1, 3, 1])
    self.assertEqual(unknown, ["while.3", "while.5"])

  def test_a_loop_that_says_how_often_is_believed(self):
    said = ', backend_config={"known_trip_count":{"n":"7"}}'
    text = "\n".join(
        line + said if " while(" in line else line for line in TEXT.splitlines()
    )
    found, unknown = program_lib.runs(program_lib.parse(text))
    self.assertEqual(unknown, [])
    times = {run.times for run in found if run.instruction.opcode == "negate"}
    self.assertEqual(times, {7})

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
