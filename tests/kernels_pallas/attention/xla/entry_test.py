import functools
from unittest import mock

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
from kernels_pallas import output
from kernels_pallas.attention import api
from kernels_pallas.attention import shapes
from kernels_pallas.attention.xla import entry
from kernels_pallas.attention.xla import plan
from kernels_pallas.attention.xla import schedule
from tests import draws
from tests.kernels_pallas import conformance
from tests.kernels_pallas import memory

_ALL = conformance.Options(
    soft_cap=3.0, scale=0.3, has_sinks=True, has_row_weights=True
)


def _attend(*arrays, **options):
  return api.attention(
      *arrays,
      **options,
      return_lse=True,
      return_col_mass=True,
      implementation="xla",
  )


def _causal_forward(length):
  mask = masks.causal(length)
  return lambda *arrays: _attend(*arrays, where=mask)


def _gradients(call):
  return jax.grad(lambda *arrays: call(*arrays).out.sum(), argnums=(0, 1, 2))


def _document(query, *arrays):
  """Under a mask that is only known when the program runs."""
  ids = jnp.cumsum(query[0, :, 0, 0] > 3).astype(jnp.int32)
  return _attend(query, *arrays, where=masks.document(ids))


def _compile_few_loops(test):
  """Most of the time is the compiler's, once a loop."""
  for name in ("_NUM_WIDTHS", "_NUM_TRACED_WIDTHS"):
    patch = mock.patch.object(schedule, name, 2)
    patch.start()
    test.addCleanup(patch.stop)


_PROGRAMS = (
    ("forward", _causal_forward),
    ("backward", lambda length: _gradients(_causal_forward(length))),
    ("full", lambda _: _attend),
    ("documents", lambda _: _document),
)


class MemoryTest(parameterized.TestCase):
  """Of compiled programs that are not run."""

  def setUp(self):
    super().setUp()
    _compile_few_loops(self)

  @parameterized.named_parameters(*_PROGRAMS)
  @pytest.mark.by_default("backward")
  def test_grows_as_the_sequence(self, make):
    # One head: any T x S array would be 17 GB at the last length.
    found = [
        memory.temp_bytes(make(length), shapes.square(length, 1, 1, 64))
        for length in (65_536, 131_072)
    ]
    memory.assert_linear(found)

  @pytest.mark.slow
  def test_grouped_heads_are_not_repeated(self):
    # A block of queries is 8 heads deep here, and has 8 times as many rows.
    call = _causal_forward(65_536)
    one, eight = (
        memory.temp_bytes(call, shapes.square(65_536, num, 1, 64))
        for num in (1, 8)
    )
    self.assertLess(eight, 8 * one)

  @pytest.mark.slow
  def test_long_sequences_fit_a_laptop(self):
    # T = 16,384, 8 heads: logits of the whole would be 8.6 GB.
    shape = shapes.square(16_384, 8, 8, 64)
    call = _gradients(_causal_forward(16_384))
    self.assertLess(memory.total_bytes(call, shape), 1e9)


@pytest.mark.slow
class AllLoopsMemoryTest(parameterized.TestCase):

  @parameterized.named_parameters(*_PROGRAMS)
  def test_grows_as_the_sequence(self, make):
    found = [
        memory.temp_bytes(make(length), shapes.square(length, 2, 1, 64))
        for length in (32_768, 65_536, 131_072)
    ]
    memory.assert_linear(found)


class TilesTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    _compile_few_loops(self)

  @parameterized.parameters("causal", "full", "hash")
  @pytest.mark.slow
  def test_do_not_change_the_result(self, family):
    shape = shapes.TESTS["cross_mqa"]
    sizes = shape.num_queries, shape.num_keys
    buckets = np.random.default_rng(0).integers(0, 3, shape.num_keys)
    mask = {
        "causal": masks.causal(*sizes, offset=sizes[1] - sizes[0]),
        "full": None,
        "hash": masks.hash_sparse(buckets[: sizes[0]], buckets),
    }[family]
    allowed = np.ones((1, 1, 1, 1), bool)
    inputs = conformance.draw(shape, "float32", allowed, _ALL)

    def run(block_q, block_kv):
      config = entry.Config(block_q=block_q, block_kv=block_kv)

      @jax.jit
      def outputs(arrays):
        return api.attention(
            **arrays,
            **inputs.keywords,
            where=mask,
            return_lse=True,
            return_col_mass=True,
            implementation="xla",
            config=config,
        )

      result, pullback = jax.vjp(outputs, inputs.arrays)
      zero = jnp.zeros_like(result.col_mass)
      cotangents = output.AttentionOutput(inputs.d_out, inputs.d_lse, zero)
      return result, pullback(cotangents)

    one, *others = (run(*tiles) for tiles in ((136, 333), (16, 128), (50, 7)))
    for other in others:
      conformance.check_equal(one[0], other[0], 1e-6)
      conformance.check_equal(one[1], other[1], 2e-6)

  def test_are_few_in_long_sequences(self):
    # Lists of tiles would grow as T S.
    for num_keys in (2**17, 2**20, 2**22 + 1):
      config = plan.choose_config(num_keys, num_keys, 8, 1)
      self.assertLessEqual(-(-num_keys // config.block_kv), 1024)
    self.assertEqual(plan.choose_config(4096, 4096, 1, 1).block_kv, 128)

  def test_two_strips_at_least_leave_out_what_causal_masks_forbid(self):
    strips = {
        length: plan.choose_config(length, length, 4, 4).block_q
        for length in (64, 128, 256, 512, 1024)
    }
    self.assertEqual(strips, {64: 64, 128: 128, 256: 128, 512: 256, 1024: 256})


class EdgeTest(parameterized.TestCase):
  """Under jit and vmap, with gradients."""

  def _check(self, mask, num_keys, size=1.0):
    draw = lambda key, num: jax.random.normal(key, (3, 1, num, 2, 8))
    keys = jax.random.split(jax.random.key(0), 3)
    query = draw(keys[0], 6) * size
    arrays = [query, draw(keys[1], num_keys), draw(keys[2], num_keys)]

    def loss(*arrays):
      result = _attend(*arrays, where=mask)
      lse = jnp.where(jnp.isneginf(result.lse), 0, result.lse)
      return result.out.sum() + lse.sum(), result

    run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, result), gradients = jax.jit(jax.vmap(run))(*arrays)
    chex.assert_tree_all_finite((result.out, result.col_mass, gradients))
    return arrays, result, gradients

  @parameterized.named_parameters(
      ("no_key", 0, None),
      ("all_masked", 5, masks.Mask(*np.zeros((2, 1, 6), np.int32))),
      ("lengths_0", 5, masks.key_lengths(6, np.array([0]))),
  )
  def test_nothing_to_attend_to(self, num_keys, mask):
    _, result, gradients = self._check(mask, num_keys)
    np.testing.assert_array_equal(result.out, 0)
    np.testing.assert_array_equal(result.lse, -np.inf)
    np.testing.assert_array_equal(result.col_mass, 0)
    for gradient in gradients:
      np.testing.assert_array_equal(gradient, 0)

  @parameterized.parameters(1.0, 1e4)
  @pytest.mark.by_default(1)
  def test_one_key_gets_everything(self, size):
    (query, key, value), result, _ = self._check(None, 1, size)
    value = jnp.broadcast_to(value, result.out.shape)
    np.testing.assert_allclose(result.out, value, rtol=1e-6)
    logits = jnp.einsum(
        "VBTNH,VBSNH->VBNT", query, key, precision="highest"
    ) * (8**-0.5)
    np.testing.assert_allclose(result.lse, logits, rtol=1e-5, atol=1e-5 * size)
    np.testing.assert_allclose(result.col_mass, 6.0, rtol=1e-6)

  def test_huge_logits_hand_out_all_mass(self):
    _, result, _ = self._check(masks.causal(6), 6, 1e4)
    np.testing.assert_allclose(result.col_mass.sum(axis=-1), 6.0, rtol=1e-6)

  def test_a_sink_of_minus_infinity_is_none(self):
    arrays = draws.normal(0, 3, 1, 6, 2, 8)
    mask = masks.key_lengths(6, np.array([0]))

    def loss(sink_logits, mask):
      return _attend(*arrays, where=mask, sink_logits=sink_logits).out.sum()

    sink_logits = jnp.full(2, -jnp.inf)
    for where in (mask, None):
      gradient = jax.jit(jax.grad(functools.partial(loss, mask=where)))
      np.testing.assert_array_equal(gradient(sink_logits), 0)
    chex.assert_trees_all_equal(
        jax.jit(_attend)(*arrays, sink_logits=sink_logits),
        jax.jit(_attend)(*arrays),
    )


class SinkTest(parameterized.TestCase):

  def test_gradient_adds_up_rows_that_are_not_rounded(self):
    # 384 rows of bfloat16: with delta from rounded rows it is off by 0.017.
    shape = shapes.TESTS["long"]
    buckets = np.random.default_rng(0).integers(0, 4, shape.num_keys)
    mask = masks.hash_sparse(buckets, buckets)
    allowed = masks.allowed(mask, shape.num_keys)[None, None]
    inputs = conformance.draw(shape, "bfloat16", allowed, _ALL)
    call = functools.partial(api.attention, where=mask, implementation="xla")
    conformance.check(call, inputs, "xla")


_SHAPE = shapes.Shape(
    batch=2,
    num_queries=37,
    num_keys=50,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)


def _draw_mask(seed):
  """Any two spans a query, empty and touching ones among them; some ids."""
  rng = np.random.default_rng(seed)
  ends = np.sort(rng.integers(0, 51, (4, 2, 37)), axis=0).astype(np.int32)
  ends[1][rng.random((2, 37)) < 0.2] = 0
  ids = rng.integers(0, 2, (2, 2, 50)).astype(np.int32)
  return masks.Mask(
      ends[::2].swapaxes(0, 1),
      ends[1::2].swapaxes(0, 1),
      ids[0, :, :37],
      ids[1],
  )


@functools.cache
def _jitted():
  """One compilation for all masks."""
  config = entry.Config(block_q=16, block_kv=16)

  @jax.jit
  def run(arrays, keywords, mask, d_out, d_lse):
    def outputs(arrays):
      result = _attend(
          **{**arrays, **keywords}, where=mask, scale=0.3, config=config
      )
      return (result.out, result.lse), result.col_mass

    (out, lse), pullback, col_mass = jax.vjp(outputs, arrays, has_aux=True)
    return (out, lse, col_mass), pullback((d_out, d_lse))[0]

  return run


class AnyMaskTest(parameterized.TestCase):

  @hypothesis.given(st.integers(0, 10**6))
  @hypothesis.settings(max_examples=25, deadline=None)
  def test_equals_the_oracle(self, seed):
    mask = _draw_mask(seed)
    options = conformance.Options(scale=0.3, has_row_weights=True)
    allowed = masks.allowed(mask, _SHAPE.num_keys)[:, None]
    inputs = conformance.draw(_SHAPE, "float32", allowed, options, seed)
    weights = {"row_weights": inputs.keywords["row_weights"]}
    values, gradients = _jitted()(
        inputs.arrays,
        weights,
        jax.tree.map(jnp.asarray, mask),
        inputs.d_out,
        inputs.d_lse,
    )
    conformance.check_values(values, inputs)
    conformance.check_gradients(gradients, inputs)


if __name__ == "__main__":
  absltest.main()
