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
from kernels_pallas.attention import api
from kernels_pallas.attention import shapes
from tests import draws
from tests.kernels_pallas import conformance
from tests.kernels_pallas import modes
from tests.kernels_pallas import oracle

_IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")
_RNG = np.random.default_rng(0)


def _ids(shape, num=3):
  rng = np.random.default_rng(0)
  return np.sort(rng.integers(0, num, (shape.batch, shape.num_keys)))


# Mask families of a shape; T queries are the last of S keys.
def _make_mask(family, shape):
  num_queries, num_keys = shape.num_queries, shape.num_keys
  offset = num_keys - num_queries
  if family == "none":
    return None
  if family == "causal":
    return masks.causal(num_queries, num_keys, offset=offset)
  if family == "window":
    return masks.sliding_window(num_queries, num_keys, window=50, offset=offset)
  if family == "streaming":
    return masks.streaming(
        num_queries, num_keys, window=40, num_sinks=4, offset=offset
    )
  if family == "lengths":  # The first sequence has no key at all.
    lengths = np.arange(shape.batch) * (num_keys - 20)
    return masks.key_lengths(num_queries, lengths)
  if family == "hash":
    buckets = np.random.default_rng(0).integers(0, 4, num_keys)
    return masks.hash_sparse(buckets[-num_queries:], buckets, offset=offset)
  document = {
      "document": masks.document,
      "prefix": lambda ids: masks.prefix_lm_document(ids, prefix_len=9),
      "question": lambda ids: masks.share_question(ids, ids // 2),
  }[family]
  assert num_queries == num_keys
  return document(_ids(shape))


_PLAIN = conformance.Options()
_ALL = conformance.Options(
    soft_cap=3.0, scale=0.3, has_sinks=True, has_row_weights=True
)
_SINKS = conformance.Options(has_sinks=True)
_WEIGHTS = conformance.Options(has_row_weights=True)

# Every shape, type, mask family and option once or more.
_CASES = (
    ("one_tile", "float32", "none", _PLAIN),
    ("one_tile", "bfloat16", "causal", _ALL),
    ("ragged_gqa", "float32", "causal", _ALL),
    ("ragged_gqa", "float32", "document", _SINKS),
    ("ragged_gqa", "float32", "lengths", _PLAIN),
    ("ragged_gqa", "float32", "question", _WEIGHTS),
    ("cross_mqa", "float32", "streaming", _ALL),
    ("cross_mqa", "float32", "hash", _PLAIN),
    ("cross_mqa", "bfloat16", "none", _WEIGHTS),
    ("single_query", "float32", "window", _SINKS),
    ("long", "float32", "prefix", _PLAIN),
    ("long", "bfloat16", "window", _WEIGHTS),
)
# Those of each implementation that run by default: of the reference what it is
# for, of the TPU's kernels two spans, ids, one query, and bfloat16. Documents
# run with traced masks.
_LEAD = {
    "reference": (1, 4, 6, 7),
    "xla": (2, 4, 6, 7, 8, 9, 11),
    "pallas_tpu": (6, 7, 9, 11),
}
_SLOW_CASES = tuple(
    (shape, dtype, family, options)
    for shape in shapes.TESTS
    for dtype in ("float32", "bfloat16")
    for family in (
        "none",
        "causal",
        "window",
        "streaming",
        "lengths",
        "hash",
        "document",
        "prefix",
        "question",
    )
    for options in (_PLAIN, _ALL)
    if (shape, dtype, family, options) not in _CASES
    and not (
        family in ("document", "prefix", "question")
        and shapes.TESTS[shape].num_queries != shapes.TESTS[shape].num_keys
    )
)


def _with_gradients(run, *arrays):
  """Out, what else `run` returns, and gradients of the sum of out."""

  @jax.jit
  def both(*arrays):
    out, pullback, result = jax.vjp(run, *arrays, has_aux=True)
    return out, result, pullback(jnp.ones_like(out))

  return both(*arrays)


def _run_case(implementation, shape_name, dtype, family, options):
  shape = shapes.TESTS[shape_name]
  mask = _make_mask(family, shape)
  allowed = np.ones((1, 1, 1, 1), bool)
  if mask is not None:
    allowed = masks.allowed(mask, shape.num_keys)
    allowed = allowed[:, None] if allowed.ndim == 3 else allowed[None, None]
  inputs = conformance.draw(shape, dtype, allowed, options)

  def call(**arguments):
    return api.attention(**arguments, where=mask, implementation=implementation)

  conformance.check(call, inputs, implementation)


class FlashAttentionTest(parameterized.TestCase):

  @parameterized.parameters(
      (name, _CASES[i]) for name, lead in _LEAD.items() for i in lead
  )
  @pytest.mark.by_default(1)
  def test_equals_the_oracle(self, implementation, case):
    _run_case(implementation, *case)

  @parameterized.parameters(*_IMPLEMENTATIONS)
  @pytest.mark.slow
  def test_a_traced_mask_is_as_good_as_a_known_one(self, implementation):
    shape = shapes.TESTS["ragged_gqa"]
    mask = masks.document(_ids(shape))
    allowed = masks.allowed(mask, shape.num_keys)[:, None]
    inputs = conformance.draw(shape, "float32", allowed, _SINKS)

    def call(**arguments):
      # Zeros that XLA does not know to be zero.
      unknown = (arguments["query"][0, 0, 0, 0] * 0).astype(jnp.int32)
      traced = jax.tree.map(lambda x: jnp.asarray(x) + unknown, mask)
      return api.attention(
          **arguments, where=traced, implementation=implementation
      )

    conformance.check(call, inputs, implementation)

  @parameterized.parameters(*_IMPLEMENTATIONS)
  @pytest.mark.by_default(1)
  def test_huge_logits_choose_the_largest(self, implementation):
    # Logits of +-1e4: weights are one-hot, by any arithmetic.
    query = jnp.full((1, 128, 1, 64), 12.5).at[:, ::2].multiply(-1)
    signs = jnp.asarray(_RNG.permutation(128) - 64.0)
    key = jnp.broadcast_to(signs[None, :, None, None] / 64, (1, 128, 1, 64))
    key = key * 100
    value = draws.normal(1, 1, 128, 1, 64)

    def run(query, key, value):
      result = api.attention(
          query,
          key,
          value,
          return_lse=True,
          return_col_mass=True,
          implementation=implementation,
      )
      return result.out, result

    with modes.mode_of(implementation):
      out, result, gradients = _with_gradients(run, query, key, value)
    chex.assert_tree_all_finite((result, gradients))
    best = value[0, jnp.argmax(signs)], value[0, jnp.argmin(signs)]
    np.testing.assert_allclose(out[0, 1::2], jnp.stack([best[0]] * 64))
    np.testing.assert_allclose(out[0, ::2], jnp.stack([best[1]] * 64))
    np.testing.assert_allclose(result.lse[0, 0, ::2], 1e4, rtol=1e-6)

  @parameterized.product(
      implementation=_IMPLEMENTATIONS, has_sinks=(False, True)
  )
  @pytest.mark.by_default(2)
  def test_rows_without_a_key(self, implementation, has_sinks):
    # Queries 0..9 see nothing, query 10 one key, the rest causal ones.
    starts = np.zeros((1, 40), np.int32)
    stops = np.maximum(np.arange(40, dtype=np.int32)[None] - 9, 0)
    mask = masks.Mask(starts, stops)
    query, key, value = draws.normal(0, 3, 1, 40, 1, 32)
    sink = jnp.full((1,), 0.5) if has_sinks else None

    def run(query, key, value):
      result = api.attention(
          query,
          key,
          value,
          where=mask,
          sink_logits=sink,
          return_lse=True,
          return_col_mass=True,
          implementation=implementation,
      )
      return result.out, result

    with modes.mode_of(implementation):
      out, result, gradients = _with_gradients(run, query, key, value)
    chex.assert_tree_all_finite(gradients)
    np.testing.assert_array_equal(out[0, :10], 0)
    np.testing.assert_array_equal(gradients[0][0, :10], 0)
    lse = np.asarray(result.lse[0, 0])
    np.testing.assert_array_equal(lse[:10], 0.5 if has_sinks else -np.inf)
    if not has_sinks:
      np.testing.assert_allclose(out[0, 10], value[0, 0], rtol=1e-6)
    # Key 30 and later are seen by nobody.
    np.testing.assert_array_equal(result.col_mass[0, 0, 30:], 0)
    np.testing.assert_array_equal(gradients[2][0, 30:], 0)

  @hypothesis.given(
      st.integers(0, 10_000), st.floats(1e-3, 50), st.sampled_from((0, 1, 2))
  )
  @hypothesis.settings(max_examples=15, deadline=None)
  @pytest.mark.slow
  def test_values_of_any_size(self, seed, size, which):
    implementation = _IMPLEMENTATIONS[which]
    shape = shapes.TESTS["one_tile"]
    mask = masks.causal(128)
    inputs = conformance.draw(
        shape, "float32", masks.allowed(mask, 128)[None, None], _PLAIN, seed
    )
    arrays = dict(inputs.arrays, value=inputs.arrays["value"] * size)
    with modes.mode_of(implementation):
      got = _jitted(implementation)(**arrays)
    # Oracle of the unscaled values: attention is linear in them.
    expected = oracle.attention(inputs.case)
    largest = np.abs(inputs.case.value).max()
    np.testing.assert_allclose(
        got.out / size, expected.out, atol=2e-5 * largest
    )
    np.testing.assert_allclose(got.col_mass.sum(), 2 * 128, rtol=1e-5)


@pytest.mark.slow
class EveryCombinationTest(parameterized.TestCase):

  @parameterized.product(implementation=_IMPLEMENTATIONS, case=_SLOW_CASES)
  def test_equals_the_oracle(self, implementation, case):
    _run_case(implementation, *case)

  @parameterized.parameters(
      (name, case)
      for name, lead in _LEAD.items()
      for i, case in enumerate(_CASES)
      if i not in lead
  )
  def test_so_does_what_others_run_by_default(self, implementation, case):
    _run_case(implementation, *case)


def _attend_causally(query, key, value, implementation):
  return api.attention(
      query,
      key,
      value,
      where=masks.causal(128),
      return_col_mass=True,
      implementation=implementation,
  )


_JITTED = {}


def _jitted(implementation):
  """One compilation for all examples of a property."""
  if implementation not in _JITTED:
    _JITTED[implementation] = jax.jit(
        lambda query, key, value: _attend_causally(
            query, key, value, implementation
        )
    )
  return _JITTED[implementation]


class TransformationTest(parameterized.TestCase):

  @parameterized.parameters("xla", "pallas_tpu")
  @pytest.mark.by_default(1)
  def test_vmap_is_a_loop(self, implementation):
    arrays = draws.normal(0, 3, 2, 1, 128, 1, 32)

    @jax.jit
    def attend(query, key, value):
      return api.attention(
          query,
          key,
          value,
          where=masks.causal(128),
          return_col_mass=True,
          implementation=implementation,
      )

    with modes.mode_of(implementation):
      both = jax.jit(jax.vmap(attend))(*arrays)
      first = attend(*arrays[:, 0])
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[0], both), first, atol=1e-6
    )

  @parameterized.parameters("reference", "xla")
  @pytest.mark.by_default(1)
  def test_future_keys_have_no_gradient(self, implementation):
    query, key, value = draws.normal(0, 3, 1, 64, 1, 16)

    def head(key, value):
      result = api.attention(
          query,
          key,
          value,
          where=masks.causal(64),
          implementation=implementation,
      )
      return result.out[:, :20].sum()

    gradients = jax.jit(jax.grad(head, argnums=(0, 1)))(key, value)
    for gradient in gradients:
      np.testing.assert_array_equal(gradient[:, 20:], 0)


if __name__ == "__main__":
  absltest.main()
