from absl.testing import absltest
from absl.testing import parameterized
import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import api
from kernels_pallas.attention import reference
from kernels_pallas.attention import shapes
from tests import draws
from tests.kernels_pallas import conformance
from tests.kernels_pallas import memory


def _attend(*arrays, **options):
  return api.attention(
      *arrays,
      **options,
      return_lse=True,
      return_col_mass=True,
      implementation="xla",
  )


def _near(length):
  """Tiles around the diagonal: as many a query, however long the sequence."""
  mask = masks.streaming(length, window=1024, num_sinks=4)
  return selection_lib.from_mask(
      mask, length, length, block_q=512, block_kv=512
  )


def _forward(length):
  chosen = _near(length)
  return lambda *arrays: _attend(*arrays, where=chosen)


def _backward(length):
  call = _forward(length)
  return jax.grad(lambda *arrays: call(*arrays).out.sum(), argnums=(0, 1, 2))


class MemoryTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ("forward", _forward), ("backward", _backward)
  )
  @pytest.mark.slow
  def test_grows_as_the_sequence(self, make):
    found = [
        memory.temp_bytes(make(length), shapes.square(length, 1, 1, 64))
        for length in (65_536, 131_072)
    ]
    memory.assert_linear(found)


class TilesTest(parameterized.TestCase):

  @pytest.mark.slow  # AnyTableTest compares with the oracle.
  def test_do_not_change_the_result(self):
    shape = shapes.TESTS["cross_mqa"]
    sizes = shape.num_queries, shape.num_keys
    mask = masks.streaming(*sizes, window=100, num_sinks=3, offset=197)
    allowed = masks.allowed(mask, shape.num_keys)[None, None]
    inputs = conformance.draw(
        shape, "float32", allowed, conformance.Options(has_sinks=True)
    )

    def run(block_q, block_kv):
      chosen = selection_lib.from_mask(
          mask, *sizes, block_q=block_q, block_kv=block_kv
      )

      @jax.jit
      def outputs(arrays):
        result = _attend(**arrays, where=chosen)
        return (result.out, result.lse), result.col_mass

      found, pullback, col_mass = jax.vjp(outputs, inputs.arrays, has_aux=True)
      return found, col_mass, pullback((inputs.d_out, inputs.d_lse))

    one, *others = (run(*tiles) for tiles in ((136, 333), (32, 64), (50, 7)))
    for other in others:
      conformance.check_equal(one[:2], other[:2], 1e-6)
      conformance.check_equal(one[2], other[2], 2e-6)


_SHAPE = shapes.Shape(
    batch=2,
    num_queries=37,
    num_keys=50,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)


@jax.jit
def _run(arrays, chosen, d_out, d_lse):
  """One compilation for all tables."""

  def outputs(arrays):
    result = _attend(**arrays, where=chosen)
    return (result.out, result.lse), result.col_mass

  (out, lse), pullback, col_mass = jax.vjp(outputs, arrays, has_aux=True)
  return (out, lse, col_mass), pullback((d_out, d_lse))[0]


def _draw_selection(seed):
  """Any of 4 key blocks in any order, none too, and garbage behind them."""
  rng = np.random.default_rng(seed)
  table = rng.permuted(np.tile(np.arange(4), (2, 4, 5, 1)), axis=-1)
  num_valid = rng.integers(0, 5, (2, 4, 5))
  table[np.arange(4) >= num_valid[..., None]] = 12345
  return selection_lib.Selection(
      jnp.asarray(table, jnp.int32),
      jnp.asarray(num_valid, jnp.int32),
      jax.tree.map(jnp.asarray, masks.causal(37, 50, offset=int(seed % 14))),
      block_q=8,
      block_kv=16,
  )


class AnyTableTest(parameterized.TestCase):

  @hypothesis.given(st.integers(0, 10**6))
  @hypothesis.settings(max_examples=25, deadline=None)
  @pytest.mark.slow
  def test_equals_the_oracle(self, seed):
    chosen = _draw_selection(seed)
    allowed = np.asarray(reference.allowed_pairs(chosen, 37, 50))
    options = conformance.Options()
    inputs = conformance.draw(_SHAPE, "float32", allowed, options, seed)
    values, gradients = _run(inputs.arrays, chosen, inputs.d_out, inputs.d_lse)
    conformance.check_values(values, inputs)
    conformance.check_gradients(gradients, inputs)

  @pytest.mark.slow
  def test_nothing_listed(self):
    table = jnp.zeros((1, 1, 1, 1), jnp.int32)
    chosen = selection_lib.Selection(table, table[..., 0], None, 8, 8)
    arrays = draws.normal(0, 3, 2, 1, 8, 1, 8) * 100

    def loss(*arrays):
      result = _attend(*arrays, where=chosen)
      return result.out.sum(), result

    run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, result), gradients = jax.jit(jax.vmap(run))(*arrays)
    np.testing.assert_array_equal(result.lse, -np.inf)
    for zero in (result.out, result.col_mass, *gradients):
      np.testing.assert_array_equal(zero, 0)

  @pytest.mark.slow
  def test_huge_logits_under_vmap(self):
    chosen = _draw_selection(3)
    draw = lambda key, *dims: jax.random.normal(key, (3, 2, *dims))
    keys = jax.random.split(jax.random.key(0), 3)
    query = 1e4 * draw(keys[0], 37, 4, 8)
    key, value = (draw(k, 50, 2, 8) for k in keys[1:])

    def loss(*arrays):
      result = _attend(*arrays, where=chosen)
      return result.out.sum(), result

    run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, result), gradients = jax.jit(jax.vmap(run))(query, key, value)
    chex.assert_tree_all_finite((result.out, result.col_mass, gradients))
    # Each query with a key hands out 1, whatever the logits.
    has_key = jnp.isfinite(result.lse).sum(axis=-1)
    np.testing.assert_allclose(result.col_mass.sum(axis=-1), has_key, rtol=1e-6)


if __name__ == "__main__":
  absltest.main()
