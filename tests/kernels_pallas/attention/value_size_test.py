"""Values whose heads are of another size than those of keys."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import masks
from kernels_pallas.attention import api
from tests.kernels_pallas import modes


def _plain(query, key, value):
  """Causal attention in one formula; the scale is of the query's own size."""
  repeat = lambda x: jnp.repeat(x, query.shape[2] // x.shape[2], axis=2)
  logits = jnp.einsum(
      "BTNH,BSNH->BNTS", query, repeat(key), precision="highest"
  )
  logits = jnp.where(np.tri(logits.shape[-1], dtype=bool), logits, -jnp.inf)
  weights = jax.nn.softmax(logits * query.shape[-1] ** -0.5)
  return jnp.einsum(
      "BNTS,BSNJ->BTNJ", weights, repeat(value), precision="highest"
  )


class ValueSizeTest(parameterized.TestCase):

  @parameterized.product(
      implementation=("reference", "xla", "pallas_tpu"),
      sizes=((24, 16), (8, 20)),
  )
  @pytest.mark.by_default(0, 2)
  def test_equals_the_formula(self, implementation, sizes):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    query, key = draw(1, 9, 2, sizes[0]), draw(1, 9, 1, sizes[0])
    value, d_out = draw(1, 9, 1, sizes[1]), draw(1, 9, 2, sizes[1])
    attend = lambda *arrays: api.attention(
        *arrays, where=masks.causal(9), implementation=implementation
    ).out

    def both(attend):
      out, pullback = jax.vjp(attend, query, key, value)
      return out, pullback(d_out)

    with modes.mode_of(implementation):
      found = jax.jit(lambda: both(attend))()
    expected = jax.jit(lambda: both(_plain))()
    for one, two in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
      np.testing.assert_allclose(one, two, rtol=0, atol=2e-5)

  def test_values_of_nothing_are_refused(self):
    query = jnp.zeros((1, 9, 2, 8))
    with self.assertRaisesRegex(ValueError, "value .* head_dim of 1 or more"):
      api.attention(query, query, query[..., :0])


if __name__ == "__main__":
  absltest.main()
