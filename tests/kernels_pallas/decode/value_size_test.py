"""Decode steps whose values have heads of another size than keys."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode import api
from kernels_pallas.decode import slots as slots_lib
from kernels_pallas.decode.paged import api as paged_api
from kernels_pallas.hardware import described
from tests.kernels_pallas import modes

_PAGE = 16


def _slots(implementation, cache, token, position):
  at = jnp.full(1, position, jnp.int32)
  return api.decode_step(*token, cache, at, implementation=implementation)


def _pages(implementation, pool, token, position):
  table, ones = jnp.array([[2, 0]], jnp.int32), jnp.ones(1, jnp.int32)
  return paged_api.decode_step(
      *token,
      pool,
      table,
      2 * ones,
      position * ones,
      implementation=implementation,
  )


def _empty(step, sizes, dtype):
  key_size, value_size = sizes
  if step is _slots:
    return slots_lib.empty(
        1, 1, 2 * _PAGE, key_size, dtype, value_dim=value_size
    )
  pool = slots_lib.empty(1, 3, _PAGE, key_size, dtype, value_dim=value_size)
  return jax.tree.map(lambda x: x[0], pool)


def _tokens(sizes, num):
  rng = np.random.default_rng(0)
  draw = lambda n, size: rng.standard_normal((num, 1, n, size)).astype("f4")
  return draw(2, sizes[0]), draw(1, sizes[0]), draw(1, sizes[1])


def _rounded(rows):
  """As int8 has them."""
  scale = np.abs(rows).max(axis=-1, keepdims=True) / 127
  return np.round(rows / scale) * scale


class ValueSizeTest(parameterized.TestCase):

  @parameterized.product(
      implementation=("reference", "xla"),
      step=(_slots, _pages),
      sizes=((24, 16), (8, 20)),
      dtype=("float32", "int8"),
  )
  @pytest.mark.by_default(5, 8)
  @jax.default_matmul_precision("highest")
  def test_equals_the_formula(self, implementation, step, sizes, dtype):
    query, key, value = tokens = _tokens(sizes, 3)
    run = jax.jit(step, static_argnums=0)
    cache = _empty(step, sizes, dtype)
    for t in range(3):
      token = [jnp.asarray(x[t]) for x in tokens]
      out, cache, _ = run(implementation, cache, token, t)
    if dtype == "int8":
      key, value = (_rounded(x) for x in (key, value))
    logits = query[-1, 0] @ key[:, 0, 0].T * sizes[0] ** -0.5
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = weights @ value[:, 0, 0]
    self.assertEqual(out.shape, (1, 2, sizes[1]))
    np.testing.assert_allclose(out[0], expected, rtol=0, atol=2e-5)

  @parameterized.parameters(_slots, _pages)
  def test_kernels_have_one_size(self, step):
    token = [jnp.asarray(x[0]) for x in _tokens((24, 16), 1)]
    cache = _empty(step, (24, 16), "float32")
    with modes.mode_of("pallas_tpu"):
      with self.assertRaisesRegex(ValueError, r"24 and 16.*pad both to 24"):
        step("pallas_tpu", cache, token, 0)

  def test_where_kernels_are_xla_takes_them(self):
    with described.traced_for("v5e"):
      self.assertEqual(api.choose_for(None, 24, 16), "xla")
      self.assertEqual(api.choose_for(None, 16, 16), "pallas_tpu")

  def test_a_cache_of_other_values_is_refused(self):
    token = [jnp.asarray(x[0]) for x in _tokens((24, 16), 1)]
    cache = _empty(_slots, (24, 24), "float32")
    with self.assertRaisesRegex(ValueError, r"cache.value.*\(1, 1, 32, 16\)"):
      _slots(None, cache, token, 0)


if __name__ == "__main__":
  absltest.main()
