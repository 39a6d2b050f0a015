from absl.testing import absltest
from absl.testing import parameterized

from joma.scale import program as program_lib
from joma.scale import work


def _count(*lines, before=""):
  body = "\n".join(f"  {line}" for line in lines)
  text = f"{before}ENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"
  return work.count(program_lib.parse(text))


class WorkTest(parameterized.TestCase):

  def test_a_product_as_a_convolution(self):
    found = _count(
        "%x = bf16[32,64]{1,0} parameter(0)",
        "%w = bf16[64,16]{1,0} parameter(1)",
        "ROOT %y = bf16[32,16]{1,0} convolution(%x, %w), dim_labels=bf_io->bf",
    )
    self.assertEqual(found.flops, 2 * 32 * 64 * 16)
    # Each of the three arrays is moved once.
    self.assertEqual(found.hbm_bytes, 2 * (32 * 64 + 64 * 16 + 32 * 16))

  @parameterized.parameters(
      # A batch of 8 products [4, 16] x [16, 2]: the window's place is the
      # batch's, the rest meets zeros between the entries.
      (
          "%x = f32[8,4,16]{2,1,0} parameter(0)",
          "%w = f32[8,16,2]{2,1,0} parameter(1)",
          (
              "f32[8,4,2]{2,1,0} convolution(%x, %w), window={size=8 stride=7"
              " lhs_dilate=8}, dim_labels=0bf_0io->0bf"
          ),
          8 * 2 * 4 * 16 * 2,
      ),
      # A sum over a window of 2 with one entry of padding at each side, as in
      # the gradient of a rotation: 2 + 2 - 1 outputs meet 2 x 2 entries.
      (
          "%x = f32[2,4,16]{2,1,0} parameter(0)",
          "%w = f32[2,16,5]{2,1,0} parameter(1)",
          (
              "f32[3,4,5]{2,1,0} convolution(%x, %w), window={size=2 pad=1_1"
              " rhs_reversal=1}, dim_labels=0bf_0io->0bf"
          ),
          4 * 2 * 4 * 16 * 5,
      ),
  )
  def test_padding_is_no_work(self, image, kernel, product, flops):
    self.assertEqual(_count(image, kernel, f"ROOT %y = {product}").flops, flops)

  def test_a_slice_of_a_stack_counts_by_itself(self):
    inner = """%fused (s: f32[10,8], i: s32[], u: f32[1,8]) -> f32[1,8] {
  %s = f32[10,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %u = f32[1,8]{1,0} parameter(2)
  %one = f32[1,8]{1,0} dynamic-slice(%s, %i, %i), dynamic_slice_sizes={1,8}
  ROOT %sum = f32[1,8]{1,0} add(%one, %u)
}
%update (s.2: f32[10,8], i.2: s32[], u.2: f32[1,8]) -> f32[10,8] {
  %s.2 = f32[10,8]{1,0} parameter(0)
  %i.2 = s32[] parameter(1)
  %u.2 = f32[1,8]{1,0} parameter(2)
  ROOT %w = f32[10,8]{1,0} dynamic-update-slice(%s.2, %u.2, %i.2, %i.2)
}
"""
    found = _count(
        "%x = f32[10,8]{1,0} parameter(0)",
        "%i = s32[]{:S(2)} parameter(1)",
        "%v = f32[1,8]{1,0:S(1)} parameter(2)",
        "%row = f32[1,8]{1,0:S(1)} fusion(%x, %i, %v), kind=kLoop,"
        " calls=%fused",
        "ROOT %y = f32[10,8]{1,0} fusion(%x, %i, %row), kind=kLoop,"
        " calls=%update",
        before=inner,
    )
    # A row of 32 bytes is read, and one written; the other ends are in VMEM.
    self.assertEqual(found.hbm_bytes, 32 + 32)

  def test_a_kernel_declares_its_work(self):
    found = _count(
        "%x = f32[8]{0} parameter(0)",
        'ROOT %y = f32[8]{0} custom-call(%x), custom_call_target="k",'
        ' backend_config={"cost_estimate":{"flops":"77"}}',
    )
    self.assertEqual((found.flops, found.kernel_flops), (77, 77))
    self.assertEqual(found.hbm_bytes, 64)

  def test_a_kernel_for_gpus_declares_none(self):
    found = _count(
        "%x = f32[8]{0} parameter(0)",
        "ROOT %y = f32[8]{0} custom-call(%x),"
        ' custom_call_target="mosaic_gpu_v2"',
    )
    self.assertEqual((found.silent_kernels, found.flops), (1, 0))
    self.assertEqual(found.hbm_bytes, 2 * 8 * 4)

  def test_copies_move_what_arrives(self):
    found = _count(
        "%x = f32[80]{0} parameter(0)",
        "%s = (f32[80]{0:S(1)}, f32[80]{0}, u32[]{:S(2)}) copy-start(%x)",
        "%d = f32[80]{0:S(1)} copy-done(%s)",
        "%p = ((f32[80]{0}), f32[8]{0:S(1)}, s32[]{:S(2)}) slice-start(%x),"
        " slice={[0:8]}",
        "ROOT %y = f32[8]{0:S(1)} slice-done(%p)",
    )
    self.assertEqual(found.hbm_bytes, 320 + 32)


if __name__ == "__main__":
  absltest.main()
