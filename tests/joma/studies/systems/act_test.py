"""Calibrated heads: the rows written out, the search, and a checkpoint."""

import dataclasses
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.studies.systems import act as calibration
from joma.studies.systems.subjects import calibrated_heads
from joma.studies.systems.subjects import planted_columns
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import model as models
from joma.transformer.layers import cross_entropy
from scansnap_jax.experiment import errors
from tests.joma.studies.systems import small
from tests.joma.transformer import applied

_CONFIG = configs.TransformerConfig(
    vocab_size=9,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=16,
    embed_scale=4.0,
)
# Of 12 tokens one column in eight passes it.
_THETA, _BETA, _PROMPT = 0.13, 0.4, 8


def _model():
  model = models.Transformer(_CONFIG, implementation="reference")
  tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 9)
  return model, applied.params(model), tokens


class CalibratedHeadsTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_it_is_what_a_prompt_and_steps_of_the_system_give(self):
    """Head 1 of the first layer, heads 0 and 2 of the second."""
    model, params, tokens = _model()
    is_head = np.array([[0, 1, 0, 0], [1, 0, 1, 0]], bool)
    subject = calibrated_heads.Calibrated(model, params, _PROMPT)
    got = subject.losses(tokens, is_head, _THETA, _BETA)
    how = f"act:theta={_THETA}:beta={_BETA}:heads="
    config = dataclasses.replace(_CONFIG, attention=(f"{how}1", f"{how}0.2"))
    system = models.Transformer(config, implementation="reference")
    cache = full_cache.init(config, 2, 16)
    places = jnp.broadcast_to(jnp.arange(12)[None], (2, 12))
    _, cache = applied.step(
        system, params, tokens[:, :_PROMPT], places[:, :_PROMPT], cache
    )
    losses = []
    for place in range(_PROMPT, 11):
      one = slice(place, place + 1)
      logits, cache = applied.step(
          system, params, tokens[:, one], places[:, one], cache
      )
      target = tokens[:, place + 1 : place + 2]
      losses.append(cross_entropy.token_losses(logits, target)[:, 0])
    want = np.mean(losses, axis=0)
    np.testing.assert_allclose(got, want, atol=1e-5)
    # Plain attention is another loss, and so are other heads.
    for others in (np.zeros_like(is_head), ~is_head):
      other = subject.losses(tokens, others, _THETA, _BETA)
      self.assertGreater(np.abs(other - want).min(), 1e-4)

  def test_columns_are_of_the_prompt_and_never_the_first(self):
    weights = np.zeros((1, 1, 4, 4), np.float32)
    weights[0, 0] = [
        [1, 0, 0, 0], [0.9, 0.1, 0, 0], [0.1, 0.1, 0.8, 0], [0, 1, 0, 0],
    ]  # fmt: skip
    # Means of two rows .05 of column 1; of three .067 and .267 of column 2.
    for prompt, want in ((2, []), (3, [2]), (4, [1, 2])):
      found = calibrated_heads.columns(
          jnp.asarray(weights), jnp.float32(0.1), prompt
      )
      self.assertEqual(np.flatnonzero(found[0, 0]).tolist(), want)

  @parameterized.parameters(
      dict(use_qk_norm=True), dict(attention=("act",)), dict(windows=(4, 4))
  )
  def test_what_projections_do_not_say_is_refused(self, **changes):
    config = dataclasses.replace(_CONFIG, **changes)
    with self.assertRaisesRegex(errors.UserError, "plain attention, without"):
      calibrated_heads.Calibrated(models.Transformer(config), {}, 4)


class PlantedColumnsTest(absltest.TestCase):

  @pytest.mark.slow
  def test_the_margin_is_that_of_weights_by_hand(self):
    """One draw, its weights scaled by hand."""
    key, value = planted_columns._draw("useless", 3, 12)
    row = np.exp(np.asarray(key[:, 0], np.float64))
    row /= row.sum()
    calibrated = row.copy()
    means = [
        np.mean([
            np.exp(key[s, 0]) / np.exp(np.asarray(key[: t + 1, 0])).sum()
            if t >= s
            else 0.0
            for t in range(12)
        ])
        for s in range(12)
    ]
    is_sink = (np.array(means) > 0.1) & (np.arange(12) > 0)
    self.assertTrue(is_sink[3])
    mass = row[is_sink].sum()
    calibrated[is_sink] *= 0.4
    calibrated[~is_sink] *= (1 - 0.4 * mass) / (1 - mass)
    for beta, weights in ((0.4, calibrated), (1.0, row)):
      out = weights @ np.asarray(value)
      got = planted_columns.margins("useless", range(3, 4), 12, 0.1, beta)
      np.testing.assert_allclose(got, [out[0] - out[1:].max()], atol=1e-5)


class Subject(calibrated_heads.Calibrated):
  """Losses of four heads by hand: the second alone helps, the third hurts."""

  cost = np.array([[0.0, -0.5], [0.25, -1.0]])

  def __init__(self):
    """No model."""

  def losses(self, tokens, is_head, theta, beta):
    del theta, beta
    return np.full(len(tokens), 2 + (self.cost * is_head).sum())


class StudyTest(parameterized.TestCase):

  def test_found_are_those_that_help_alone_among_loud_ones(self):
    loud = np.array([[True, True], [True, False]])
    tokens = jnp.zeros((2, 3), jnp.int32)
    found = calibration.find(Subject(), tokens, loud, 0.1, 0.4)
    np.testing.assert_array_equal(found, [[False, True], [False, False]])
    drawn = calibration.at_random(loud, 2, 0)
    self.assertEqual(drawn.sum(), 2)
    self.assertFalse((drawn & ~loud).any())

  def test_runs_and_is_drawn(self):
    summary = small.measured("act")
    self.assertLen(summary["claims"], 2)
    self.assertEqual(summary["checkpoint"], {})
    changes = [summary["margins"][k]["change"] for k in ("useless", "useful")]
    self.assertGreater(changes[0]["mean"], 0)
    self.assertLess(changes[1]["mean"], 0)
    figure, texts = small.drawn("act")
    self.assertLen(figure.axes, 1)
    self.assertContainsSubset(["plain", "calibrated"], texts)

  @pytest.mark.slow
  def test_a_checkpoint_is_read(self):
    model, params, _ = _model()
    loaded = mock.patch.object(
        calibration.pretrained, "load", lambda _: (_CONFIG, params)
    )
    ids = np.random.default_rng(0).integers(0, 9, 80)
    text = mock.Mock(train=ids[:40], valid=ids[40:])
    corpus = mock.patch.object(
        calibration.corpus_lib, "load", lambda *_, **__: text
    )
    config = calibration.CalibrationConfig(
        num_seeds=2, num_keys=16, theta=_THETA, model="somewhere",
        num_prompt=_PROMPT, num_tokens=12, num_texts=3, betas=(0.4, 1.0),
        thetas=(_THETA, 0.9),
    )  # fmt: skip
    with loaded, corpus:
      found = calibration.measure(config)
      real = found["checkpoint"]
      self.assertLen(found["claims"], 5)
      with self.assertRaisesRegex(errors.UserError, "has 40 tokens"):
        calibration.measure(dataclasses.replace(config, num_texts=4))
    self.assertNotEmpty(real["found"])
    self.assertLess(len(real["found"]), real["num_loud"])
    # Beta of 1 is plain attention, and so is a theta that nothing passes.
    for value in (real["grid"][0][1], *real["grid"][1]):
      self.assertAlmostEqual(value, real["plain"], delta=1e-4)
    self.assertAlmostEqual(
        real["grid"][0][0], real["sets"]["found"], delta=1e-6
    )

  @parameterized.parameters(
      (dict(theta=1.0), "theta=1.0 must lie"),
      (dict(betas=(0.1, 2.0)), "beta=2.0 must lie"),
      (dict(betas=()), "one value or more"),
      (dict(num_tokens=96), "num_tokens=96 must be more than"),
      (dict(num_texts=1), "num_texts must be at least 2"),
  )
  def test_settings_that_cannot_be_are_refused(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      calibration.CalibrationConfig(**changes)


if __name__ == "__main__":
  absltest.main()
