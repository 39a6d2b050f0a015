from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np

from kernels_pallas.aot import operands


class ImageTest(parameterized.TestCase):

  def test_rows_are_padded_to_lanes(self):
    value = np.arange(12, dtype=np.int32).reshape(2, 6)
    image = operands.image(value, "s32[2,6]{1,0:T(1,128)}")
    self.assertLen(image, 256)
    np.testing.assert_array_equal(image[:6], value[0])
    np.testing.assert_array_equal(image[128:134], value[1])
    self.assertEqual(image.sum(), value.sum())

  def test_tiles_of_rows_lie_together(self):
    value = np.arange(4 * 256, dtype=np.int32).reshape(1, 4, 256)
    image = operands.image(value, "s32[1,4,256]{2,1,0:T(2,128)S(1)}")
    # Tile (0, 0), its second row; then tile (0, 1); then tile (1, 0).
    self.assertEqual(list(image[[128, 256, 512]]), [256, 128, 512])

  def test_four_rows_of_bytes_share_a_word(self):
    value = np.array([[1, 5], [2, 6], [3, 7], [-4, 8]], np.int8)
    image = operands.image(value, "s8[4,2]{1,0:T(4,128)(4,1)}")
    self.assertLen(image, 128)
    words = image.view(np.uint32)
    self.assertEqual((words[0], words[1]), (0xFC030201, 0x08070605))

  def test_a_vector_is_a_row(self):
    image = operands.image(np.arange(5, dtype=np.int32), "s32[5]{0:T(128)}")
    np.testing.assert_array_equal(image[:5], range(5))

  @parameterized.parameters("s32[2,6]{0,1:T(1,128)}", "s32[2,6]{1,0}")
  def test_other_layouts_are_not_known(self, layout):
    self.assertIsNone(operands.image(np.zeros((2, 6), np.int32), layout))


class OfKernelsTest(parameterized.TestCase):

  def _program(self, table):
    def kernel(table, x, out):
      out[...] = x[...] + table[0, 0]

    call = pl.pallas_call(
        kernel,
        grid=(2, 3),
        in_specs=[pl.BlockSpec((1, 6), lambda i, j: (i, 0))] * 2,
        out_specs=pl.BlockSpec((1, 6), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((2, 6), jnp.int32),
    )
    # What follows from constants is known, also inside functions.
    return lambda x, y: jax.jit(call)(table(y) + 1, x)

  def _found(self, table):
    array = jax.ShapeDtypeStruct((2, 6), jnp.int32)
    jaxpr = jax.make_jaxpr(self._program(table))(array, array)
    shape = "s32[2,6]{1,0:T(1,128)}"
    hlo = (
        f"  %a.1 = {shape} constant(0)\n  %b = {shape} parameter(0)\n"
        f"  ROOT %k.1 = {shape} custom-call(%a.1, /*index=1*/%b),"
        ' custom_call_target="tpu_custom_call"\n'
    )
    return operands.of_kernels(jaxpr, hlo)

  def test_constants_are_found_with_their_values(self):
    values = np.arange(12, dtype=np.int32).reshape(2, 6)
    found = self._found(lambda _: jnp.asarray(values))
    self.assertEqual(list(found), ["k.1"])
    self.assertEqual(found["k.1"].num_steps, 6)
    self.assertEqual(list(found["k.1"].images), [0])
    np.testing.assert_array_equal(found["k.1"].images[0][:6], values[0] + 1)

  def test_what_depends_on_arguments_is_not_known(self):
    self.assertEmpty(self._found(lambda y: y)["k.1"].images)


if __name__ == "__main__":
  absltest.main()
