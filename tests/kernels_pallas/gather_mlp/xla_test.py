from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gather_mlp import api
from kernels_pallas.gather_mlp import shapes
from kernels_pallas.gather_mlp import xla
from tests.kernels_pallas.gather_mlp import oracle


def _dense(arrays):
  """A dense MLP as anyone would write it."""
  multiply = lambda letters, *x: jnp.einsum(letters, *x, precision="highest")
  hidden = multiply("BD,FD->BF", arrays["x"], arrays["up"])
  hidden = hidden + arrays["up_bias"][None]
  if "gate" in arrays:
    gate = multiply("BD,FD->BF", arrays["x"], arrays["gate"])
    hidden = jax.nn.silu(gate + arrays["gate_bias"][None]) * hidden
  else:
    hidden = jax.nn.relu(hidden)
  y = multiply("BF,FD->BD", hidden, arrays["down"])
  return y + arrays["down_bias"][None]


class XlaTest(parameterized.TestCase):

  @parameterized.product(
      name=("one", "swiglu_bias"), kind=("shared", "shuffled", "per_sequence")
  )
  @pytest.mark.by_default(0, 1)
  def test_all_blocks_are_the_dense_mlp_bit_by_bit(self, name, kind):
    shape = shapes.TESTS[name]
    case = oracle.draw(shape, "float32")
    ids = np.arange(shape.num_blocks, dtype=np.int32)
    if kind == "shuffled":
      ids = ids[::-1].copy()
    elif kind == "per_sequence":
      ids = np.tile(ids, (shape.batch, 1))

    @jax.jit
    def gathered(arrays, ids):
      return api.gather_mlp(
          **arrays,
          block_ids=ids,
          activation="silu" if shape.is_gated else "relu",
          block_size=shape.block_size,
          implementation="xla",
      )

    np.testing.assert_array_equal(
        gathered(case.arrays, ids), jax.jit(_dense)(case.arrays)
    )
    # One that only one sequence leaves out is not the dense MLP.
    if kind == "per_sequence" and shape.batch > 1:
      ids[0, 0] = ids[0, 1]
      self.assertFalse(
          np.array_equal(gathered(case.arrays, ids), _dense(case.arrays))
      )

  def test_nothing_is_gathered_first(self):
    shape = shapes.Shape(batch=1, width=256, num_neurons=8192)
    x, weights = shape.arrays("float32")

    def call(x, up, down, ids, num_valid):
      return api.gather_mlp(
          x, up, down, ids, num_valid=num_valid, implementation="xla"
      )

    ids = jax.ShapeDtypeStruct((60,), jnp.int32)
    num = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = jax.jit(call).lower(x, weights.up, weights.down, ids, num)
    memory = lowered.compile().memory_analysis()
    # Less than three blocks of 128 rows, whatever the number of blocks.
    self.assertLess(memory.temp_size_in_bytes, 3 * 128 * 256 * 4)

  def test_there_is_nothing_to_choose(self):
    self.assertEqual(xla.Config(), xla.Config())


if __name__ == "__main__":
  absltest.main()
