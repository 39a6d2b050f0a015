"""jax's and Flax's attention, called through their own signatures."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import masks
from kernels_pallas.attention import array_masks
from kernels_pallas.attention import drop_in

_B, _T, _S, _N, _K, _H = 2, 6, 8, 4, 2, 8
_TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32; sums run in another order.


def _draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _arrays():
  return (
      _draw(_B, _T, _N, _H),
      _draw(_B, _S, _K, _H, seed=1),
      _draw(_B, _S, _K, _H, seed=2),
  )


def _any_mask(*lead):
  """No spans, but no query without a key."""
  mask = np.random.default_rng(3).random((*lead, _T, _S)) < 0.5
  mask[..., 0] = True
  return mask


# What jax.nn's takes; each is given to both.
_CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "window": {"local_window_size": (2, 1)},
    "one_window": {"local_window_size": 1, "is_causal": True},
    "lengths": {"key_value_seq_lengths": np.array([3, 8], np.int32)},
    "query_lengths": {"query_seq_lengths": np.array([2, 6], np.int32)},
    "bias": {"bias": _draw(1, _N, _T, _S, seed=4)},
    "span_mask": {"mask": np.tri(_T, _S, 2, dtype=bool)[None, None]},
    "any_mask": {"mask": _any_mask(_B, 1)},
    "mask_of_heads": {"mask": _any_mask(_B, _N), "is_causal": True},
}


class DotProductAttentionTest(parameterized.TestCase):

  @parameterized.named_parameters(*_CASES.items())
  @pytest.mark.by_default("_jax_lengths")
  def test_values_and_residuals_are_those_of_jax(self, options):
    want, want_lse = jax.nn.dot_product_attention(
        *_arrays(), **options, return_residual=True
    )
    out, lse = drop_in.dot_product_attention(
        *_arrays(), **options, return_residual=True
    )
    chex.assert_trees_all_close(out, want, **_TOLERANCE)
    # Queries behind the end have no lse: jax leaves what it is without keys.
    is_query = np.isfinite(lse)
    chex.assert_trees_all_close(
        np.where(is_query, lse, 0),
        np.where(is_query, want_lse, 0),
        **_TOLERANCE,
    )

  @pytest.mark.slow
  def test_col_mass_is_the_sum_of_a_key_s_weights(self):
    query, key, value = _arrays()
    mask = _any_mask(1, 1)
    out, mass = drop_in.dot_product_attention(
        query, key, value, mask=mask, return_col_mass=True
    )
    logits = np.einsum("btnh,bsnh->bnts", query, np.repeat(key, 2, axis=2))
    weights = np.exp(logits / np.sqrt(_H)) * mask
    weights /= weights.sum(axis=-1, keepdims=True)
    chex.assert_trees_all_close(mass, weights.sum(axis=2), **_TOLERANCE)
    self.assertEqual(out.shape, query.shape)

  @pytest.mark.slow
  def test_a_single_sequence_and_a_traced_mask(self):
    query, key, value = (x[0] for x in _arrays())
    for mask in (_any_mask(1), np.tri(_T, _S, 2, dtype=bool)[None]):
      attend = jax.jit(
          lambda m: drop_in.dot_product_attention(query, key, value, mask=m)
      )
      want = jax.nn.dot_product_attention(query, key, value, mask=mask)
      chex.assert_trees_all_close(attend(mask), want, **_TOLERANCE)

  @pytest.mark.slow
  def test_gradients_are_those_of_jax(self):
    def loss(attend, bias, *arrays, mask):
      return jnp.sum(attend(*arrays, bias, mask) ** 2)

    bias, arrays = _draw(1, 1, _T, _S), _arrays()
    for mask in (_any_mask(_B, 1), np.tri(_T, _S, 2, dtype=bool)[None, None]):
      for given in (bias, None):
        where = (0, 1, 2, 3) if given is not None else (1, 2, 3)
        made = [
            jax.jit(jax.grad(functools.partial(loss, f), where))(
                given, *arrays, mask=mask
            )
            for f in (
                drop_in.dot_product_attention,
                jax.nn.dot_product_attention,
            )
        ]
        chex.assert_trees_all_close(*made, rtol=1e-4, atol=1e-4)

  @pytest.mark.slow
  def test_many_pieces_are_one(self):
    query, key, value = (
        _draw(1, 300, 2, 8),
        _draw(1, 40, 2, 8),
        _draw(1, 40, 2, 8),
    )
    bias = _draw(1, 2, 300, 40)
    out, mass = drop_in.dot_product_attention(
        query, key, value, bias, return_col_mass=True
    )
    want = jax.nn.dot_product_attention(query, key, value, bias)
    chex.assert_trees_all_close(out, want, **_TOLERANCE)
    chex.assert_trees_all_close(mass.sum(), 600.0, rtol=1e-5)  # One a row.


class AsMaskTest(parameterized.TestCase):

  @parameterized.parameters(
      ("000000", True),
      ("001100", True),
      ("110011", True),
      ("101010", False),
      ("111111", True),
      ("100001", True),
  )
  def test_spans_are_those_of_the_row(self, row, fits):
    allowed = np.array([[c == "1" for c in row]])
    mask, has_all = array_masks.as_mask(allowed)
    self.assertEqual(bool(has_all), fits)
    if fits:
      np.testing.assert_array_equal(masks.allowed(mask, len(row)), allowed)


class FlaxAttentionTest(parameterized.TestCase):

  @parameterized.parameters((None,), (np.tri(_T, dtype=bool)[None, None],))
  @pytest.mark.by_default(1)
  def test_linen_s_module_gives_its_values_and_sows_sums(self, mask):
    x = _draw(_B, _T, 16)
    make = lambda **options: nn.MultiHeadDotProductAttention(
        num_heads=_N, **options
    )
    plain, ours = make(), make(attention_fn=drop_in.flax_attention)
    variables = plain.init(jax.random.key(0), x)
    run = lambda module: module.apply(
        variables, x, mask=mask, sow_weights=True, mutable="intermediates"
    )
    (want, seen), (got, sown) = run(plain), run(ours)
    chex.assert_trees_all_close(got, want, **_TOLERANCE)
    (weights,) = seen["intermediates"]["attention_weights"]
    (mass,) = sown["intermediates"]["col_mass"]
    chex.assert_trees_all_close(mass, weights.sum(axis=2), **_TOLERANCE)
    (lse,) = sown["intermediates"]["lse"]
    self.assertEqual(lse.shape, (_B, _N, _T))

  def test_nnx_s_module_gives_its_values_and_sows_sums(self):
    x = _draw(_B, _T, 16)
    make = lambda **options: nnx.MultiHeadAttention(
        _N, 16, decode=False, rngs=nnx.Rngs(0), **options
    )
    plain, ours = make(), make(attention_fn=drop_in.flax_attention)
    want = plain(x, is_causal=True)
    chex.assert_trees_all_close(ours(x, is_causal=True), want, **_TOLERANCE)
    attend = nnx.capture(lambda m, x: m(x, sow_weights=True), nnx.Intermediate)
    _, sown = attend(ours, x)
    chex.assert_trees_all_close(
        sown["col_mass"][0].sum(axis=-1), np.full((_B, _N), _T), **_TOLERANCE
    )

  @pytest.mark.slow
  def test_no_batch_axes_and_two(self):
    mask = _any_mask(1)[..., :_T]
    for batch in ((), (2, 3)):
      x = _draw(*batch, _T, 16)
      for given in (mask, np.broadcast_to(mask, (*batch, 1, _T, _T))):
        plain = nn.MultiHeadDotProductAttention(num_heads=_N)
        variables = plain.init(jax.random.key(0), x)
        ours = plain.copy(attention_fn=drop_in.flax_attention)
        want = plain.apply(variables, x, mask=given)
        got = ours.apply(variables, x, mask=given)
        chex.assert_trees_all_close(got, want, **_TOLERANCE)

  @pytest.mark.slow
  def test_decode_steps_of_linen_s_own_cache(self):
    x = _draw(_B, _T, 16)
    plain = nn.MultiHeadDotProductAttention(num_heads=_N, decode=True)
    variables = plain.init(jax.random.key(0), x)
    outs = []
    for module in (plain, plain.copy(attention_fn=drop_in.flax_attention)):
      state, made = variables, []
      step = jax.jit(functools.partial(module.apply, mutable="cache"))
      for t in range(_T):
        y, cache = step(state, x[:, t : t + 1])
        state = {**variables, **cache}
        made.append(y)
      outs.append(jnp.concatenate(made, axis=1))
    chex.assert_trees_all_close(*outs, **_TOLERANCE)

  @pytest.mark.slow
  def test_a_mask_of_spans_through_where(self):
    x = _draw(_B, _T, 16)
    attend = functools.partial(drop_in.flax_attention, where=masks.causal(_T))
    plain = nn.MultiHeadDotProductAttention(num_heads=_N)
    variables = plain.init(jax.random.key(0), x)
    want = plain.apply(variables, x, mask=np.tri(_T, dtype=bool)[None, None])
    got = plain.copy(attention_fn=attend).apply(variables, x)
    chex.assert_trees_all_close(got, want, **_TOLERANCE)

  def test_dropped_weights_are_refused(self):
    with self.assertRaisesRegex(ValueError, "dropout_rate=0.1 would drop"):
      drop_in.flax_attention(*[_draw(1, 2, 2, 4)] * 3, dropout_rate=0.1)


if __name__ == "__main__":
  absltest.main()
