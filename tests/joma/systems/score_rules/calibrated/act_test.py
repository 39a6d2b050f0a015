"""Calibrated attention beside its rows written out; planted columns."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.systems.score_rules.calibrated import act
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

_OPTIONS = hooks.AttentionOptions(scale=0.35, implementation="reference")


@functools.cache
def _arrays():
  """Two texts; the third key of each is loud, so that it is a sink."""
  draw = lambda seed, heads: jax.random.normal(
      jax.random.key(seed), (2, 9, heads, 8)
  )
  query, key, value = draw(0, 4), draw(1, 2), draw(2, 2)
  query = query.at[..., 0].set(2.0)
  return query, key.at[:, 2, :, 0].set(3.0), value


def _by_hand(query, key, value, theta, beta, first=1):
  """Outputs [B, T, N, H], rows [B, N, T, S] and S [B, N, S], in float64."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  key, value = np.repeat(key, 2, axis=2), np.repeat(value, 2, axis=2)
  logits = 0.35 * np.einsum("BTNH,BSNH->BNTS", query, key)
  logits = np.where(np.tri(9, dtype=bool)[None, None], logits, -np.inf)
  rows = np.exp(logits - logits.max(-1, keepdims=True))
  rows /= rows.sum(-1, keepdims=True)
  is_sink = rows.mean(axis=2) > theta
  is_sink[..., :first] = False
  plain, is_in = rows.copy(), is_sink[:, :, None]
  mass = (rows * is_in).sum(-1, keepdims=True)
  others = (1 - beta * mass) / np.where(mass > 1 - 1e-9, 1, 1 - mass)
  rows = np.where(mass > 1 - 1e-9, rows, rows * np.where(is_in, beta, others))
  return np.einsum("BNTS,BSNH->BTNH", rows, value), rows, plain, is_sink


class ActTest(parameterized.TestCase):

  def _run(self, **options):
    places = jnp.broadcast_to(jnp.arange(9)[None], (2, 9))
    calibrated = act.Act(**options).calibrated
    run = jax.jit(lambda *arrays: calibrated(*arrays, places, _OPTIONS))
    return run(*_arrays())

  @parameterized.parameters((0.1, 0.4), (0.2, 0.0), (0.15, 1.0))
  @pytest.mark.by_default(0, 1)
  def test_it_is_the_rows_written_out(self, theta, beta):
    out, chosen = self._run(theta=theta, beta=beta)
    want, rows, plain, is_sink = _by_hand(*_arrays(), theta, beta)
    # Digits are lost as the mass on S comes to 1; up to .8 it is within 1e-5.
    mass = (plain * is_sink[:, :, None]).sum(-1).swapaxes(1, 2)[..., None]
    error = np.abs(np.asarray(out) - want)
    self.assertLess((error * (1 - mass)).max(), 2e-6)
    np.testing.assert_allclose(rows.sum(-1), 1, atol=1e-6)
    self.assertTrue(is_sink[:, :, 2].all())
    # Only columns of S lose; the first token never does.
    loses = ((rows < plain - 1e-9) & ~is_sink[:, :, None]).any()
    self.assertFalse(loses)
    for place in np.ndindex(2, 4):
      found = set(np.asarray(chosen)[place].tolist()) - {-1}
      self.assertEqual(found, set(np.flatnonzero(is_sink[place]).tolist()))

  def test_its_own_rows_sum_to_one_and_columns_of_s_alone_lose(self):
    """Weights are what values of 0 and 1 come to: all 1, and one key's 1."""
    query, key, _ = _arrays()
    places = jnp.broadcast_to(jnp.arange(9)[None], (2, 9))
    run = jax.jit(
        lambda value: act.Act().calibrated(query, key, value, places, _OPTIONS)
    )
    ones = jnp.ones((2, 9, 2, 8))
    out, chosen = run(ones)
    _, _, plain, is_sink = _by_hand(*_arrays(), 0.1, 1.0)
    mass = (plain * is_sink[:, :, None]).sum(-1).swapaxes(1, 2)[..., None]
    # Digits are lost by 1 / (1 - m).
    self.assertLess((np.abs(out - 1) * (1 - mass)).max(), 3e-7)
    column = jnp.eye(9, 8)[None, :, None] * ones  # The last key's is left out.
    rows = np.asarray(run(column)[0]).swapaxes(1, 2)
    loses = (rows < plain[..., :8] - 1e-6).any(axis=2)
    self.assertFalse((loses & ~is_sink[..., :8]).any())
    self.assertTrue(loses[..., 2].all())
    self.assertFalse((np.asarray(chosen) == 0).any())

  def test_the_first_token_is_not_one_of_them(self):
    """The twin takes it in where it passes theta: another answer."""
    out, chosen = self._run(theta=0.1)
    self.assertFalse((np.asarray(chosen) == 0).any())
    twin, *_ = _by_hand(*_arrays(), 0.1, 0.4, first=0)
    self.assertGreater(np.abs(np.asarray(out) - twin).max(), 1e-3)

  @pytest.mark.slow
  def test_beta_of_one_is_attention_and_other_heads_are_left(self):
    plain, _ = self._run(beta=1.0)
    some, _ = self._run(heads="1.3")
    every, _ = self._run()
    np.testing.assert_allclose(some[:, :, ::2], plain[:, :, ::2], atol=1e-6)
    np.testing.assert_allclose(some[:, :, 1::2], every[:, :, 1::2], atol=1e-6)
    self.assertGreater(float(jnp.abs(every - plain)[:, :, ::2].max()), 1e-3)

  @pytest.mark.slow
  def test_steps_keep_the_columns_of_the_prompt(self):
    """A prompt's outputs are a pass; a step is its row with the prompt's S."""
    config = configs.TransformerConfig(
        vocab_size=11, num_layers=1, embed_dim=16, num_heads=4, num_kv_heads=2,
        head_dim=8, hidden_dim=16, attention=("act:theta=0.12",),
    )  # fmt: skip
    model = models.Transformer(config, implementation="reference")
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 11)
    params = applied.params(model)
    places = jnp.broadcast_to(jnp.arange(9)[None], (2, 9))
    cache = full_cache.init(config, 2, 16)
    got, cache = applied.step(
        model, params, tokens[:, :8], places[:, :8], cache
    )
    want = applied.logits(model, params, tokens[:, :8])
    np.testing.assert_allclose(got, want, atol=1e-5)
    before = cache[0].chosen
    self.assertGreater(int((before >= 0).sum()), 0)
    step, after = applied.step(
        model, params, tokens[:, 8:], places[:, 8:], cache
    )
    np.testing.assert_array_equal(after[0].chosen, before)
    # Nothing else is in the step: without calibration it is another one.
    plain = models.Transformer(
        configs.TransformerConfig(**{**vars(config), "attention": ()}),
        implementation="reference",
    )
    full = applied.logits(plain, params, tokens)[:, 8:]
    self.assertGreater(float(jnp.abs(step - full).max()), 1e-5)

  @parameterized.parameters(
      (dict(theta=0.0), "theta=0.0 must lie in"),
      (dict(beta=1.5), "beta=1.5 must lie in"),
      (dict(heads="0,2"), "heads='0,2' must be numbers with dots"),
  )
  def test_what_cannot_be_is_refused(self, options, message):
    with self.assertRaisesRegex(errors.UserError, message):
      act.Act(**options)


if __name__ == "__main__":
  absltest.main()
