from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import masks
from kernels_pallas.hardware import gpu_math

# Two hundred roundings of float32 numbers of order 1.
_ATOL = 2e-5


class ArithmeticTest(parameterized.TestCase):
  """The functions of a tile against float64, without a kernel."""

  def test_predicate_is_the_mask(self):
    ids = np.arange(48) % 5
    mask = masks.streaming(48, window=9, num_sinks=3) & masks.hash_sparse(
        ids, ids[::-1].copy()
    )
    keys = jnp.broadcast_to(jnp.arange(48), (48, 48))
    spans = [(mask.starts[i][:, None], mask.stops[i][:, None]) for i in (0, 1)]
    ids = jnp.asarray(mask.query_ids)[:, None], jnp.asarray(mask.key_ids)[None]
    found = gpu_math.is_allowed(keys, spans, *ids)
    np.testing.assert_array_equal(found, masks.allowed(mask, 48))

  def test_online_softmax_in_pieces_is_softmax(self):
    rng = np.random.default_rng(0)
    logits = 4 * rng.standard_normal((8, 96))
    logits[0, :32] = -np.inf  # A row that has no key in the first piece,
    logits[1] = -np.inf  # and one that never has any.
    highest, total = jnp.full((8,), -1e30), jnp.zeros((8,))
    summed = jnp.zeros((8, 96))
    for i in range(3):
      piece = jnp.asarray(logits[:, 32 * i : 32 * i + 32], jnp.float32)
      weights, correction, highest, total = gpu_math.online_softmax(
          piece, highest, total
      )
      summed = summed * correction[:, None]
      summed = summed.at[:, 32 * i : 32 * i + 32].set(weights)
    expected = np.exp2(logits - np.where(np.arange(8) == 1, 0, 20)[:, None])
    expected /= np.maximum(expected.sum(axis=1, keepdims=True), 1e-300)
    found = summed / jnp.where(total > 0, total, 1)[:, None]
    np.testing.assert_allclose(found, expected, atol=_ATOL)
    assert total[1] == 0

  @parameterized.parameters(None, 3.0)
  @pytest.mark.slow
  def test_gradient_of_a_tile(self, soft_cap):
    rng = np.random.default_rng(1)
    products, d_weights = rng.standard_normal((2, 8, 16))
    scale = 0.7

    def weights_of(products):
      logits = gpu_math.log2_logits(products, scale, soft_cap)
      lse = jax.nn.logsumexp(logits * np.log(2), axis=1) * gpu_math.LOG2_E
      return gpu_math.weights_of(logits, lse, axis=0)

    with jax.enable_x64(True):
      wide = jnp.asarray(products)
      expected = jax.vjp(weights_of, wide)[1](jnp.asarray(d_weights))[0]
      logits = scale * products
      if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
      exact = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    narrow = jnp.asarray(products, jnp.float32)
    weights = weights_of(narrow)
    np.testing.assert_allclose(weights, exact, atol=_ATOL)
    logits = gpu_math.log2_logits(narrow, scale, soft_cap)
    slopes = gpu_math.with_cap_slope(weights, logits, soft_cap)
    masked = gpu_math.with_cap_slope(
        0 * weights, 0 * logits - jnp.inf, soft_cap
    )
    np.testing.assert_array_equal(masked, 0)
    delta = jnp.asarray((exact * d_weights).sum(axis=1), jnp.float32)
    for axis in (0, 1):
      turn = (lambda x: x) if axis == 0 else jnp.transpose
      found = gpu_math.d_products(
          turn(slopes), turn(jnp.asarray(d_weights, jnp.float32)), delta, axis
      )
      np.testing.assert_allclose(
          scale * turn(found), expected, atol=_ATOL, err_msg=f"axis {axis}"
      )
