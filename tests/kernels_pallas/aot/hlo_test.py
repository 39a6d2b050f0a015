from absl.testing import absltest
from absl.testing import parameterized

from kernels_pallas.aot import hlo

# Of libtpu 0.0.42, cut.
# ruff: noqa: E501
_TEXT = """
%fused_computation (p.1: f32[8,128]) -> f32[8,128] {
  %p.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %copy.9 = f32[8,128]{1,0:T(8,128)} copy(%p.1)
}
ENTRY %main {
  %k = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="k"}
  %near = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} copy(%k)
  %back = bf16[64,128]{1,0:T(8,128)(2,1)} copy(%near)
  %copy-start.1 = (bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0}, u32[]{:S(2)}) copy-start(%k)
  %copy-done.1 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %copy-start.2 = (bf16[64,128]{1,0}, bf16[64,128]{1,0}, u32[]{:S(2)}) copy-start(%k)
  %f.1 = f32[8,128]{1,0} fusion(%x), calls=%fused_computation, backend_config={"estimated_cycles":"1200"}
  %g.1 = f32[8,128]{1,0} fusion(%x), backend_config={"estimated_cycles":"34"}
  %kernel.1 = (f32[512,128]{1,0:T(8,128)}, bf16[1,4096,128]{2,1,0}) custom-call(%copy-done.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": 512
}}, backend_config={"scoped_memory_configs":[],"used_scoped_memory_configs":[{"memory_space":"0","size":"7"},{"memory_space":"1","offset":"0","size":"2412544"}],"retry_config":{}}
  %other = f32[] custom-call(), custom_call_target="Sharding"
  ROOT %kernel.2 = f32[8] custom-call(%f.1), custom_call_target="tpu_custom_call", backend_config={"used_scoped_memory_configs":[]}
}
"""


class HloTest(parameterized.TestCase):

  def test_the_largest_array_is_one_outside_of_fusions(self):
    self.assertEqual(hlo.largest_array(_TEXT), 64 * 128 * 2)
    fused = _TEXT.replace("f32[8,128]{1,0:T(8,128)}", "f32[4096,128]{1,0}")
    self.assertEqual(hlo.largest_array(fused), 64 * 128 * 2)
    entry = _TEXT.replace("%g.1 = f32[8,128]", "%g.1 = f32[4096,128]")
    self.assertEqual(hlo.largest_array(entry), 4096 * 128 * 4)

  @parameterized.parameters(
      ("bf16[8,128]{1,0:T(8,128)(2,1)}", 2048),
      ("f8e4m3fn[16]", 16),
      ("s4[16]{0}", 8),
      ("pred[3,5]", 15),
      ("f32[]", 4),
      ("token[]", 4),
  )
  def test_array_bytes(self, shape, num_bytes):
    self.assertEqual(hlo.array_bytes(shape), num_bytes)

  def test_copies_within_hbm_are_listed_and_prefetches_are_not(self):
    self.assertEqual(
        hlo.copies(_TEXT, min_bytes=1),
        (
            hlo.Copy("f32[8,128]{1,0:T(8,128)}", 4096),
            hlo.Copy("bf16[64,128]{1,0}", 16384),
        ),
    )
    self.assertLen(hlo.copies(_TEXT, min_bytes=4097), 1)

  def test_kernels_and_their_vmem_even_over_several_lines(self):
    self.assertEqual(hlo.kernels(_TEXT), {"kernel.1": 2412544, "kernel.2": 0})

  def test_fusion_cycles_are_summed(self):
    self.assertEqual(hlo.fusion_cycles(_TEXT), 1234)


if __name__ == "__main__":
  absltest.main()
