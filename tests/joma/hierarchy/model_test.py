import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.hierarchy import data
from joma.hierarchy import model as hierarchy_model
from joma.hierarchy import run

# Logits are near 1 and gradients below 1; float32 adds 24 terms in each of a
# few dozen layers of arithmetic, so that a dozen roundings of 6e-8 remain.
_ATOL = 1e-6
# The same in float64, whose roundings are 1e-16, with as much room.
_ATOL_X64 = 1e-12
_PADDING = 39
# Tests compile much and run little.
_FAST_COMPILE = {"xla_backend_optimization_level": "0"}


def _model(**changes):
  sizes = dict(num_classes=6, num_layers=2, embed_dim=16, hidden_dim=24)
  return hierarchy_model.HierarchyTransformer(
      num_tokens=_PADDING + 1, **sizes | changes
  )


@functools.cache
def _tokens(seq_len=14):
  made = data.make_hierarchy(
      0, num_tokens=_PADDING + 1, num_latents=(8, 8, 6), set_sizes=(2,) * 3
  )
  return data.to_tokens(made.is_present, seq_len)


def _observe(dtype, tokens, num_padding=1):
  """Logits, and what each block sows."""
  observe = jax.jit(
      functools.partial(_model().apply, mutable="intermediates"),
      compiler_options=_FAST_COMPILE,
  )
  params = {"params": _cast(dtype)}
  logits, seen = observe(params, jnp.asarray(tokens), jnp.int32(num_padding))
  return logits, seen["intermediates"]


@functools.cache
def _params(seed=0):
  init = jax.jit(_model().init, compiler_options=_FAST_COMPILE)
  params = init(jax.random.key(seed), jnp.asarray(_tokens()))
  # LayerNorm starts at scale 1 and bias 0, where mistakes would not show.
  leaves, tree = jax.tree.flatten(params["params"])
  rng = np.random.default_rng(seed)
  noisy = [
      np.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape) for leaf in leaves
  ]
  return jax.tree.unflatten(tree, noisy)


def _cast(dtype):
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), _params())


def _numpy_logits(params, tokens):
  """The plain model, one sequence and one position at a time, in float64."""
  logits = []
  for sequence in tokens:
    stream = [params["embedding"][token] for token in sequence]
    for layer in range(2):
      p = params[hierarchy_model.block_name(layer)]
      following = []
      for t, own in enumerate(stream):
        seen = np.array(stream[: t + 1])
        scores = (seen @ p["W_K"]) @ (own @ p["W_Q"]) / np.sqrt(len(own))
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        middle = own + weights @ (seen @ p["W_V"])
        middle = _numpy_norm(middle, p["norm_1_scale"], p["norm_1_bias"])
        hidden = np.maximum(middle @ p["mlp_in_w"] + p["mlp_in_b"], 0)
        after = middle + hidden @ p["mlp_out_w"] + p["mlp_out_b"]
        following.append(
            _numpy_norm(after, p["norm_2_scale"], p["norm_2_bias"])
        )
      stream = following
    logits.append(stream[-1] @ params["classes_w"] + params["classes_b"])
  return np.array(logits)


def _numpy_norm(x, scale, bias):
  return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * scale + bias


class LogitsTest(parameterized.TestCase):

  def test_equal_those_of_loops_over_positions(self):
    with jax.enable_x64():
      logits, _ = _observe(np.float64, _tokens())
      np.testing.assert_allclose(
          logits, _numpy_logits(_params(), _tokens()), atol=_ATOL_X64
      )

  @pytest.mark.slow
  def test_later_tokens_do_not_reach_back(self):
    tokens = jnp.asarray(_tokens())
    other = tokens.at[:, -1].set((tokens[:, -1] + 1) % _PADDING)
    streams = [
        _observe(np.float32, these)[1]["block_1"]["hidden"][0]
        for these in (tokens, other)
    ]
    np.testing.assert_array_equal(streams[0][:, :-1], streams[1][:, :-1])
    self.assertGreater(np.abs(streams[0][:, -1] - streams[1][:, -1]).max(), 0.1)

  @pytest.mark.slow
  def test_initial_values_are_uniform_up_to_one_over_the_root_of_fan_in(self):
    model = _model(embed_dim=64, hidden_dim=100)
    init = jax.jit(model.init, compiler_options=_FAST_COMPILE)
    params = init(jax.random.key(0), jnp.asarray(_tokens()))["params"]
    block = params["block_1"]
    for leaf, fan_in in (
        (block["W_Q"], 64),
        (block["mlp_in_w"], 64),
        (block["mlp_in_b"], 64),
        (block["mlp_out_w"], 100),
        (params["classes_w"], 64),
    ):
      bound = fan_in**-0.5
      self.assertBetween(np.abs(leaf).max(), 0.9 * bound, bound)
      # The standard error of the deviation is below bound / sqrt(12 n).
      error = 5 * bound / np.sqrt(12 * leaf.size)
      self.assertAlmostEqual(leaf.std(), bound / np.sqrt(3), delta=error)


class SavingsTest(parameterized.TestCase):
  """Each saving leaves loss, gradient and scores' inputs what they are."""

  def _value_and_grad(self, dtype, tokens, num_padding, last_only):
    loss = functools.partial(
        run.weighted_loss, model=_model(), last_only=last_only
    )
    value_and_grad = jax.jit(
        jax.value_and_grad(loss), compiler_options=_FAST_COMPILE
    )
    return value_and_grad(
        _cast(dtype),
        tokens=jnp.asarray(tokens),
        labels=jnp.arange(6),
        weights=jnp.asarray([0.3, 0.1, 0.0, 0.2, 0.25, 0.15], dtype),
        num_padding=jnp.int32(num_padding),
    )

  def _check(self, dtype, atol, seq_len=14):
    tokens = _tokens(seq_len)
    plain = self._value_and_grad(dtype, tokens, 1, False)
    merged, num_padding = data.merge_padding(tokens, 8)
    self.assertLess(merged.shape[1], seq_len - 4)
    found = self._value_and_grad(dtype, merged, num_padding, True)
    chex.assert_trees_all_close(found, plain, rtol=0, atol=atol)
    return tokens, merged, num_padding, plain

  @pytest.mark.slow
  def test_loss_and_gradient_are_equal_in_float32(self):
    self._check(np.float32, _ATOL)

  @pytest.mark.slow
  def test_loss_and_gradient_are_equal_in_float64(self):
    with jax.enable_x64():
      tokens, merged, num_padding, plain = self._check(
          np.float64, _ATOL_X64, seq_len=60
      )
      for case in ((merged, num_padding, False), (tokens, 1, True)):
        found = self._value_and_grad(np.float64, *case)
        chex.assert_trees_all_close(found, plain, rtol=0, atol=_ATOL_X64)
      wrong, _ = self._value_and_grad(np.float64, merged, num_padding + 1, True)
      self.assertGreater(abs(wrong - plain[0]), 1e-4)

  @pytest.mark.slow
  def test_a_merged_token_carries_what_its_copies_do(self):
    with jax.enable_x64():
      tokens = _tokens()
      merged, n = data.merge_padding(tokens, 8)
      _, long = _observe(np.float64, tokens)
      _, brief = _observe(np.float64, merged, n)
      for layer in range(2):
        plain, short = (seen[f"block_{layer}"] for seen in (long, brief))
        for i in range(n):
          np.testing.assert_allclose(
              plain["hidden"][0][:, i], short["hidden"][0][:, 0], atol=_ATOL_X64
          )
        np.testing.assert_allclose(
            plain["hidden"][0][:, n:], short["hidden"][0][:, 1:], atol=_ATOL_X64
        )
        rows = plain["attn_weights"][0][:, n - 1 :]
        summed = np.concatenate(
            [rows[..., :n].sum(axis=2, keepdims=True), rows[..., n:]], axis=2
        )
        np.testing.assert_allclose(
            short["attn_weights"][0], summed, atol=_ATOL_X64
        )


if __name__ == "__main__":
  absltest.main()
