"""Tests of rules that choose neurons, against NumPy."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.sparsity import contextual_config
from joma.inference.sparsity import unit_rules
from joma.inference.sparsity.study import training_free
from joma.transformer import config as configs
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied


def make_view(**changes):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  view = unit_rules.View(
      resid=draw(2, 5, 4),
      hidden_pre=draw(2, 5, 6),
      hidden=draw(2, 5, 6),
      strengths=jnp.abs(draw(2, 5, 3)),
      activation=draw(2, 5, 6),
      is_prompt=jnp.arange(5)[None] < jnp.array([[3], [2]]),
      arrays={},
      layer=0,
      block_size=2,
  )
  return view._replace(**changes)


class RuleTest(parameterized.TestCase):

  def test_griffin_looks_at_the_prompt_alone_row_by_row(self):
    view = make_view()
    kept = unit_rules.Griffin(num=2).keep(view)
    scores = unit_rules.Griffin().scores(view.hidden, view.is_prompt, 2)
    for b, prompt_len in enumerate((3, 2)):
      h = np.asarray(view.hidden[b, :prompt_len], np.float64)
      # One loud token has no more to say than a quiet one.
      h = h / np.linalg.norm(h, axis=1, keepdims=True)
      squares = (h**2).sum(axis=0).reshape(3, 2).sum(axis=1)
      np.testing.assert_allclose(scores[b], squares, rtol=1e-6)
      expected = np.zeros(3, bool)
      expected[np.argsort(-squares)[:2]] = True
      for t in range(5):
        np.testing.assert_array_equal(kept[b, t], expected)
    loud = view.hidden.at[0, 0].multiply(1e3).at[0, 4].multiply(1e3)
    np.testing.assert_array_equal(
        unit_rules.Griffin(num=2).keep(view._replace(hidden=loud)), kept
    )

  @parameterized.parameters("oracle", "random")
  @pytest.mark.slow
  def test_a_number_may_be_traced(self, name):
    rule = {"oracle": unit_rules.Oracle(), "random": unit_rules.Random()}[name]

    @jax.jit
    def keep(num):
      return rule.keep(make_view(arrays={"num_blocks": num}))

    for num in (1, 2, 3):
      found = keep(jnp.int32(num))
      self.assertTrue((found.sum(axis=-1) == num).all())
      fixed = dataclasses.replace(rule, num=num).keep(make_view())
      np.testing.assert_array_equal(found, fixed)

  def test_random_is_another_choice_in_every_layer(self):
    rule = unit_rules.Random(num=1)
    found = [rule.keep(make_view(layer=layer)) for layer in (0, 1)]
    self.assertTrue((found[0] != found[1]).any())

  def test_thresholds_keep_what_is_large_and_nothing_that_is_0(self):
    size = jnp.asarray([[[-2.0, 0.5, 0.0, 1.0, -1.0, 0.1]]])
    for least, expected in (
        (1.0, [1, 0, 0, 1, 1, 0]),
        (0.0, [1, 1, 0, 1, 1, 1]),
    ):
      arrays = {
          name: jnp.float32(least) for name in ("cats", "teal", "teal_inputs")
      }
      view = make_view(activation=size, hidden=size, arrays=arrays)
      for found in (
          unit_rules.Cats().keep(view),
          unit_rules.Teal().keep(view),
          unit_rules.Teal().keep_inputs(size, arrays),
      ):
        np.testing.assert_array_equal(found[0, 0], np.array(expected, bool))

  def test_a_kv_head_is_kept_for_any_of_its_queries(self):
    chosen = jnp.array([[1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(
        unit_rules.kv_heads(chosen, 2), [[1, 0], [0, 1], [0, 0]]
    )

  def test_a_threshold_of_heads_leaves_at_least_the_strongest(self):
    scores = jnp.array([[-3.0, -1.0, -2.0], [1.0, -1.0, 2.0]])
    np.testing.assert_array_equal(
        unit_rules.HeadRule().keep(scores, {}), [[0, 1, 0], [1, 0, 1]]
    )


class CalibrateTest(absltest.TestCase):

  @pytest.mark.slow
  def test_the_asked_share_lies_above_a_threshold(self):
    config = configs.TransformerConfig(
        vocab_size=17,
        num_layers=2,
        embed_dim=8,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        hidden_dim=20,
    )
    model = models.Transformer(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(17, size=(3, 7)))
    params = applied.params(model)
    shares = (0.25, 0.5, 1.0)
    found = training_free.calibrate(model, params, tokens, shares)
    _, seen = jax.jit(
        lambda p: model.apply({"params": p}, tokens, mutable="intermediates")
    )(params)
    for layer in range(2):
      here = seen["intermediates"][f"layers_{layer}"]["mlp"]
      for name, values in (
          ("cats", jax.nn.silu(here["hidden_pre"][0])),
          ("teal", here["hidden"][0]),
      ):
        for i, share in enumerate(shares):
          above = (jnp.abs(values) >= found[name][layer, i]).mean()
          # One of the 420 numbers, at most.
          self.assertAlmostEqual(float(above), share, delta=1 / 420 + 1e-6)
    self.assertEqual(found["teal_inputs"].shape, (2, 3))
    # All is all, of other texts too.
    np.testing.assert_array_equal(found["teal"][:, 2], [0, 0])
    with self.assertRaisesRegex(errors.UserError, "share must lie in"):
      training_free.calibrate(model, params, tokens, (0.0,))


class ConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      ({"shares": (0.5, 1.5)}, "shares must lie in"),
      ({"recalls": ()}, "recalls must name at least one"),
      ({"prompt_fraction": 1.0}, "a prompt has at least 1"),
      ({"embed_dim": 40}, "multiple of the 32"),
      ({"num_texts": 1}, "num_texts must be at least 2"),
  )
  def test_settings_that_cannot_be_are_refused(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      contextual_config.ContextualConfig(**changes)


if __name__ == "__main__":
  absltest.main()
