"""Titans' memory: its recurrences, the delta rule, and whether it trains."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.systems.mixers.memory import titans_memory
from joma.transformer import attention
from kernels_pallas import masks
from kernels_pallas.gated_delta_rule import api
from scansnap_jax.experiment import errors
from tests import draws
from tests.joma.systems import one_layer

_LENGTH, _SIZE = 7, 4
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": "0"}
)


def _tokens(**fixed):
  """Two texts, three heads of four channels; rates as they are given."""
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  wide = [draws.normal(i, 2, _LENGTH, 3, _SIZE) for i in range(3)]
  rates = {
      name: scale * jax.nn.sigmoid(draws.normal(i, 2, _LENGTH, 3))
      for i, (name, scale) in enumerate(
          (("keep", 1.0), ("rate", 0.3), ("forget", 0.5)), start=3
      )
  }
  rates |= {name: jnp.full((2, _LENGTH, 3), x) for name, x in fixed.items()}
  return titans_memory.Tokens(unit(wide[0]), unit(wide[1]), wide[2], **rates)


def _weights(depth):
  return tuple(0.5 * draws.normal(9 + i, 3, _SIZE, _SIZE) for i in range(depth))


def _swept(weights, tokens, size, lengths=(_LENGTH, _LENGTH)):
  run = lambda weights, tokens: titans_memory.sweep(
      titans_memory.begin(weights, 2),
      tokens,
      jnp.array(lengths),
      size,
  )
  return _jit(run)(weights, tokens)


def _by_hand(weights, tokens, size):
  """Linear memories [B, N, H, H], token by token, in float64."""
  query, key, value, keep, rate, forget = (np.float64(x) for x in tokens)
  memory = np.repeat(np.float64(weights[0])[None], 2, axis=0)
  start, momentum, outs = memory, np.zeros_like(memory), []
  wide = lambda x: x[..., None, None]
  for t in range(_LENGTH):
    if t % size == 0:
      start = memory
    missing = np.einsum("BNHJ,BNH->BNJ", start, key[:, t]) - value[:, t]
    grad = 2 * key[:, t][..., None] * missing[..., None, :]
    momentum = wide(keep[:, t]) * momentum - wide(rate[:, t]) * grad
    memory = wide(1 - forget[:, t]) * memory + momentum
    outs.append(np.einsum("BNHJ,BNH->BNJ", memory, query[:, t]))
  return np.stack(outs, axis=1), memory


class MemoryTest(parameterized.TestCase):

  @parameterized.parameters(1, 3, 16)
  def test_is_the_two_recurrences_by_hand(self, size):
    tokens, weights = _tokens(), _weights(1)
    out, state = _swept(weights, tokens, size)
    want, memory = _by_hand(weights, tokens, size)
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(state.memory[0], memory, atol=1e-5)

  def test_alone_it_is_the_delta_rule(self):
    """Linear, without momentum and forgetting, in chunks of one."""
    tokens = _tokens(keep=0.0, forget=0.0)
    weights = (jnp.zeros((3, _SIZE, _SIZE)),)
    out, state = _swept(weights, tokens, 1)
    rule = functools.partial(api.gated_delta_rule, implementation="reference")
    want = _jit(functools.partial(rule, scale=1.0))(
        *tokens[:3], jnp.zeros_like(tokens.rate), 2 * tokens.rate
    )
    np.testing.assert_allclose(out, want.out, atol=1e-6)
    np.testing.assert_allclose(state.memory[0], want.state, atol=1e-6)

  def test_with_forgetting_it_is_not_the_gated_delta_rule(self):
    """That one forgets what it erases too: alpha beta k k^T M apart."""
    forget, rate = 0.3, 0.2
    tokens = _tokens(keep=0.0, forget=forget, rate=rate)
    tokens = jax.tree.map(lambda x: x[:, :1], tokens)
    weights = _weights(1)
    run = lambda weights, tokens: titans_memory.sweep(
        titans_memory.begin(weights, 2), tokens, jnp.array([1, 1]), 1
    )[1].memory[0]
    got = _jit(run)(weights, tokens)
    before = jnp.broadcast_to(weights[0][None], (2, *weights[0].shape))
    decay = jnp.full((2, 1, 3), np.log(1 - forget))
    beta = jnp.full((2, 1, 3), 2 * rate)
    rule = lambda *x: api.gated_delta_rule(
        *x, initial_state=before, implementation="reference"
    )
    gated = _jit(rule)(*tokens[:3], decay, beta).state
    key = np.asarray(tokens.key)[:, 0]
    recalled = np.einsum("BNHJ,BNH->BNJ", before, key)
    apart = forget * 2 * rate * key[..., None] * recalled[:, :, None]
    np.testing.assert_allclose(gated - got, apart, atol=1e-6)
    self.assertGreater(np.abs(apart).max(), 0.01)

  @parameterized.parameters(2, 4)
  def test_a_gradient_is_that_of_the_squared_error(self, depth):
    weights = tuple(x[0] for x in _weights(depth))
    key, value = draws.normal(1, _SIZE), draws.normal(2, _SIZE)
    grad = lambda is_mean: _jit(
        functools.partial(
            titans_memory.gradient, rule=titans_memory.Rule(is_mean)
        )
    )(weights, key, value)
    gelu = lambda x: (
        x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
    )

    def error(weights):
      x = np.float64(key)
      for i, matrix in enumerate(weights):
        x = x @ matrix
        x = gelu(x) if i + 1 < depth else x
      return np.square(x - np.float64(value)).sum()

    found, mean = grad(False), grad(True)
    for layer in range(depth):
      moved = [np.float64(x) for x in weights]
      want = np.zeros((_SIZE, _SIZE))
      for place in np.ndindex(_SIZE, _SIZE):
        sides = []
        for eps in (1e-4, -1e-4):
          moved[layer][place] += eps
          sides.append(error(moved))
          moved[layer][place] -= eps
        want[place] = (sides[0] - sides[1]) / 2e-4
      np.testing.assert_allclose(found[layer], want, atol=1e-4)
      np.testing.assert_allclose(mean[layer], want / _SIZE, atol=1e-4)

  def test_padding_changes_nothing(self):
    tokens, weights = _tokens(), _weights(2)
    _, padded = _swept(weights, tokens, 3, lengths=(4, 6))
    run = lambda tokens: titans_memory.sweep(
        titans_memory.begin(weights, 2),
        tokens,
        jnp.full(2, tokens.key.shape[1]),
        3,
    )[1]
    for row, length in enumerate((4, 6)):
      part = titans_memory.Tokens(*(x[:, :length] for x in tokens))
      alone = _jit(run)(part)
      pairs = zip(jax.tree.leaves(padded), jax.tree.leaves(alone), strict=True)
      for got, want in pairs:
        np.testing.assert_allclose(got[row], want[row], atol=1e-6)

  def test_a_gradient_keeps_the_states_of_chunks_alone(self):
    size, length, shape = 8, 64, (2, 64, 3, 16)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    tokens = titans_memory.Tokens(*[of(*shape)] * 3, *[of(*shape[:3])] * 3)
    weights = (of(3, 16, 16),) * 2
    run = lambda weights, tokens: titans_memory.sweep(
        titans_memory.begin(weights, 2),
        tokens,
        jnp.full(2, length),
        size,
    )[0]
    kept = jax.eval_shape(lambda *x: jax.vjp(run, *x)[1], weights, tokens)
    num_kept = sum(x.size for x in jax.tree.leaves(kept))
    # Start, newest and momentum of two layers, of two texts and three heads.
    state = 3 * 2 * 2 * 3 * 16**2
    given = sum(x.size for x in tokens)
    self.assertGreaterEqual(num_kept, length // size * state)
    self.assertLess(num_kept, 2 * (length // size * state + given))


class LayerTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_four_layers_train_from_every_seed(self):
    """To say the value of the newest of few keys, by five seeds."""
    entry = "titans:depth=4:chunk=4"
    config, _, x = one_layer.draw(entry)
    module = attention.Attention(config, 0, implementation="reference")
    places = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
    mask = masks.causal(x.shape[1])
    target = jnp.roll(x, 2, axis=1).at[:, :2].set(0)

    def loss(params):
      out = module.apply({"params": params}, x, places, mask)[0]
      return jnp.square(out - target).mean()

    @_jit
    def train(key):
      def step(params, _):
        value, grads = jax.value_and_grad(loss)(params)
        size = jnp.sqrt(
            sum(jnp.square(g).sum() for g in jax.tree.leaves(grads))
        )
        move = lambda p, g: p - 0.05 * g / jnp.maximum(size, 1e-6)
        return jax.tree.map(move, params, grads), value

      params = module.init(key, x, places, mask)["params"]
      return jax.lax.scan(step, params, length=60)[1]

    for seed in range(5):
      losses = np.asarray(train(jax.random.key(seed)))
      self.assertTrue(np.isfinite(losses).all(), seed)
      self.assertLess(losses[-1], 0.8 * losses[0], seed)

  @pytest.mark.slow
  def test_means_of_squares_are_their_sums_with_smaller_steps(self):
    """By as much as a head has channels."""
    outs = []
    for entry in ("titans:loss=mean:rate=4.0:chunk=4", "titans:chunk=4"):
      config, params, x = one_layer.draw(entry)
      outs.append(one_layer.run(config, params, x)[0])
    np.testing.assert_allclose(*outs, atol=1e-5)

  @parameterized.parameters(
      ("titans:depth=0", "titans: depth must be from 1 to 8"),
      ("titans:chunk=0", "titans: chunk must be at least 1"),
      ("titans:loss=max", "titans: loss='max' must be one of"),
      ("titans:gelu=exact", "titans: gelu='exact' must be one of"),
      ("titans:rate=0", "titans: rate must be positive"),
  )
  def test_says_what_would_be_right(self, entry, message):
    with self.assertRaisesRegex(errors.UserError, message):
      one_layer.draw(entry)


if __name__ == "__main__":
  absltest.main()
