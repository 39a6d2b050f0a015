from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear_attention import api
from kernels_pallas.linear_attention import shapes
from kernels_pallas.linear_attention import xla
from tests import draws
from tests.kernels_pallas import conformance
from tests.kernels_pallas import memory
from tests.kernels_pallas.linear_attention import oracle


class XlaTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_results_do_not_depend_on_the_chunk(self):
    case = oracle.draw(shapes.TESTS["ragged_gqa"], "float32", "mixed")

    def run(chunk):
      call = lambda **arguments: api.linear_attention(
          **arguments, implementation="xla", config=xla.Config(chunk=chunk)
      )
      return oracle.run(call, case, "xla")

    one, other = run(200), run(48)
    conformance.check_equal(one[0], other[0], 1e-6)
    conformance.check_equal(one[1], other[1], 2e-6)

  @pytest.mark.slow
  def test_memory_grows_as_the_length(self):
    def temp_bytes(length):
      shape = shapes.Shape(
          length=length, num_heads=2, num_kv_heads=1, head_dim=32
      )

      def loss(*arrays):
        return api.linear_attention(*arrays, implementation="xla").out.sum()

      return memory.temp_bytes(jax.grad(loss, argnums=(0, 1, 2)), shape)

    memory.assert_linear([temp_bytes(n) for n in (16_384, 32_768)])

  @pytest.mark.slow
  def test_an_unwanted_gradient_of_the_decay_costs_nothing(self):
    arrays = tuple(draws.normal(0, 3, 1, 640, 1, 8))

    def loss(query, key, value, decay):
      return api.linear_attention(
          query,
          key,
          value,
          decay=decay,
          implementation="xla",
          config=xla.Config(chunk=16),
      ).out.sum()

    def num_loops(argnums):
      grad = jax.jit(jax.grad(loss, argnums=argnums))
      text = grad.lower(*arrays, jnp.full(1, 0.9)).compile().as_text()
      return text.count(" while(")

    # Of a sum: by the query one sweep, and one more by the decay.
    self.assertEqual([num_loops((0,)), num_loops((0, 3))], [1, 2])

  def test_a_chunk_of_nothing_is_refused(self):
    with self.assertRaisesRegex(ValueError, "chunk=0 must be at least 1"):
      xla.Config(chunk=0)

  @pytest.mark.slow
  def test_a_decay_of_one_forgets_nothing(self):
    # Unit keys and values: out counts the positions so far.
    ones = jnp.ones((1, 300, 1, 1))
    out = api.linear_attention(ones, ones, ones, implementation="xla").out
    np.testing.assert_array_equal(out[0, :, 0, 0], np.arange(1, 301))


if __name__ == "__main__":
  absltest.main()
