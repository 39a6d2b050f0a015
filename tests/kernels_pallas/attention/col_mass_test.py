from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import masks
from kernels_pallas.attention import api
from kernels_pallas.attention import shapes
from tests import draws
from tests.kernels_pallas import conformance
from tests.kernels_pallas import modes

_IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")
_RNG = np.random.default_rng(0)
_PLAIN = conformance.Options()


class ColMassTest(parameterized.TestCase):

  @parameterized.parameters(*_IMPLEMENTATIONS)
  @pytest.mark.by_default(1)
  def test_is_the_value_cotangent_of_a_one_hot_channel(self, implementation):
    # c = P^T 1 is d(out . e_0)/d value[:, 0], from any attention with a vjp.
    shape = shapes.TESTS["ragged_gqa"]
    mask = masks.causal(200)
    allowed = masks.allowed(mask, 200)[None, None]
    arrays = conformance.draw(shape, "float32", allowed, _PLAIN).arrays

    def attend(value):
      return api.attention(
          arrays["query"],
          arrays["key"],
          value,
          where=mask,
          return_col_mass=True,
          col_mass_heads="kv",
          implementation=implementation,
      )

    @jax.jit
    def both(value):
      out, pullback, col_mass = jax.vjp(
          lambda v: (attend(v).out, attend(v).col_mass), value, has_aux=True
      )
      one_hot = jnp.zeros_like(out).at[..., 0].set(1.0)
      return pullback(one_hot)[0], col_mass

    with modes.mode_of(implementation):
      cotangent, col_mass = both(arrays["value"])
    np.testing.assert_allclose(
        col_mass, jnp.moveaxis(cotangent[..., 0], 1, 2), atol=2e-5 * 200
    )
    # Every query of the two heads of a group hands out a mass of 1.
    np.testing.assert_allclose(col_mass.sum(axis=-1), 400.0, rtol=1e-5)

  @parameterized.parameters(*_IMPLEMENTATIONS)
  @pytest.mark.by_default(1, 2)
  def test_moves_with_the_keys(self, implementation):
    query, key, value = draws.normal(0, 3, 1, 96, 2, 32)
    order = _RNG.permutation(96)
    attend = jax.jit(
        lambda *arrays: api.attention(
            *arrays, return_col_mass=True, implementation=implementation
        )
    )
    with modes.mode_of(implementation):
      one = attend(query, key, value)
      two = attend(query, key[:, order], value[:, order])
    np.testing.assert_allclose(
        one.col_mass[..., order], two.col_mass, atol=1e-4
    )
    np.testing.assert_allclose(one.out, two.out, atol=1e-5)

  @parameterized.parameters("reference", "xla")
  def test_lets_no_gradient_through(self, implementation):
    arrays = draws.normal(0, 3, 1, 16, 1, 8)

    def mass_of_key_3(*arrays):
      result = api.attention(
          *arrays, return_col_mass=True, implementation=implementation
      )
      return result.col_mass[..., 3].sum()

    gradients = jax.jit(jax.grad(mass_of_key_3, argnums=(0, 1, 2)))(*arrays)
    for gradient in gradients:
      np.testing.assert_array_equal(gradient, 0)


if __name__ == "__main__":
  absltest.main()
