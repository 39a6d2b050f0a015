"""Tests of predictors: they learn planted sparsity, and keep their word."""

import dataclasses
import functools
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.sparsity import contextual_config
from joma.inference.sparsity import predictors
from joma.inference.sparsity.study import capture
from joma.inference.sparsity.study import predictor_training as training
from joma.transformer import config as configs
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from scansnap_jax.experiment.processes import preemption
from tests.joma.transformer import applied

# Neuron j of each layer fires where x . u_j > .9, all u_j in _RANK dimensions.
_RANK, _WIDTH, _NEURONS = 8, 32, 64
_MODEL = models.Transformer(
    configs.TransformerConfig(
        vocab_size=512,
        num_layers=2,
        embed_dim=_WIDTH,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        hidden_dim=_NEURONS,
        activation="relu",
        use_gated_mlp=False,
        use_mlp_bias=True,
    )
)
_CONFIG = contextual_config.PredictorConfig(
    rank=_RANK,
    head_rank=4,
    num_steps=600,
    batch_size=128,
    lr=3e-2,
    weight_decay=0.0,
)


@functools.cache
def planted() -> capture.Shards:
  params = applied.params(_MODEL)
  keys = iter(jax.random.split(jax.random.key(1), 8))
  for layer in range(2):
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    u = normal(_WIDTH, _RANK) @ normal(_RANK, _NEURONS)
    u = u / jnp.linalg.norm(u, axis=0, keepdims=True)
    up = {"kernel": u, "bias": jnp.full(_NEURONS, -0.9)}
    params[f"layers_{layer}"]["mlp"]["up"] = up
  texts = np.random.default_rng(2).integers(512, size=(256, 32))
  folder = pathlib.Path(tempfile.mkdtemp())
  return capture.write(
      _MODEL,
      params,
      texts.astype(np.int32),
      folder,
      contextual_config.CaptureConfig(label="sign", batch_size=256),
  )


@functools.cache
def trained(config):
  data = training.split(planted(), config, 0.5)
  return data, training.train(data, pathlib.Path(tempfile.mkdtemp()))


def recall_at_count(params, data):
  """Share of the k true units of a token among its k best scores."""
  examples = data.examples(data.held_out)
  scores = np.asarray(
      jax.jit(training.all_scores)(params["mlp"], examples.inputs["mlp"])
  )
  truth = examples.is_positive["mlp"]
  rank = np.argsort(np.argsort(-scores, axis=-1), axis=-1)
  found = (rank < truth.sum(axis=-1, keepdims=True)) & truth
  return found.sum() / truth.sum(), truth.mean()


class PlantedTest(absltest.TestCase):

  @pytest.mark.slow
  def test_the_planted_rank_is_enough_and_a_quarter_is_not(self):
    data, learned = trained(_CONFIG)
    recall, density = recall_at_count(learned, data)
    self.assertBetween(density, 0.05, 0.3)
    self.assertGreaterEqual(recall, 0.95)
    small = dataclasses.replace(_CONFIG, rank=_RANK // 4)
    poor, _ = recall_at_count(trained(small)[1], data)
    self.assertLess(poor, recall - 0.2)
    untrained = predictors.init(_CONFIG, 2, _WIDTH, _NEURONS, 2)
    chance, _ = recall_at_count(untrained, data)
    self.assertLess(chance, poor - 0.1)


class CalibrateTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_a_threshold_reaches_its_recall_on_texts_not_seen(self):
    small = dataclasses.replace(_CONFIG, rank=_RANK // 4)
    data, learned = trained(small)
    # The first half of the held-out texts calibrates, the second is fresh.
    held = data.held_out
    calibrating = dataclasses.replace(
        data.shards, rows_of=(int(held[len(held) // 2]),)
    )
    fresh = held[len(held) // 2 :]
    chosen = []
    for recall in (0.8, 0.95):
      thresholds = training.calibrate(
          learned, data._replace(shards=calibrating), recall
      )
      examples = data.examples(fresh)
      scores = np.asarray(
          jax.jit(training.all_scores)(learned["mlp"], examples.inputs["mlp"])
      )
      kept = scores > np.asarray(thresholds["mlp"])[None, :, None]
      truth = examples.is_positive["mlp"]
      by_text = lambda x: x.sum(axis=2).reshape(-1, 32, 2).sum(axis=1)
      found, there = by_text(kept & truth), by_text(truth)
      reached = found.sum(axis=0) / there.sum(axis=0)
      # Texts are independent, their tokens are not; as many texts calibrated.
      error = (found / there).std(axis=0, ddof=1) * (2 / len(found)) ** 0.5
      np.testing.assert_array_less(abs(reached - recall), 3 * error)
      self.assertLess(error.max(), 0.03)
      chosen.append(kept.mean())
    self.assertLess(chosen[0], chosen[1] - 0.05)

  @parameterized.parameters(0.5, 0.8, 0.9, 1.0)
  def test_new_scores_exceed_it_as_often_as_promised(self, recall):
    rng = np.random.default_rng(0)
    reached = []
    for _ in range(2000):
      scores = rng.normal(size=20).astype(np.float32)
      least = training.threshold(scores[:19], recall)
      reached.append(scores[19] > least)
    # Exact in expectation: 19 + 1 is a multiple of what may be missed.
    self.assertAlmostEqual(np.mean(reached), recall, delta=0.034)
    if recall == 1.0:
      self.assertEqual(np.mean(reached), 1)

  def test_ties_are_exceeded(self):
    scores = np.array([1, 1, 1, 2], np.float32)
    self.assertLess(training.threshold(scores, 0.5), 1)

  @pytest.mark.slow
  def test_a_recall_that_is_none_is_refused(self):
    data, learned = trained(_CONFIG)
    with self.assertRaisesRegex(errors.UserError, "recall must lie in"):
      training.calibrate(learned, data, 1.2)


class TrainTest(absltest.TestCase):

  @pytest.mark.slow
  def test_balance_finds_what_is_rare(self):
    # Without it, fewer of the units that fire one time in five are found.
    recalls = []
    for balance in (True, False):
      config = dataclasses.replace(
          _CONFIG, rank=2, num_steps=300, class_balance=balance
      )
      data, learned = trained(config)
      examples = data.examples(data.held_out)
      scores = jax.jit(training.all_scores)(
          learned["mlp"], examples.inputs["mlp"]
      )
      truth = examples.is_positive["mlp"]
      recalls.append((np.asarray(scores > 0) & truth).sum() / truth.sum())
    self.assertGreater(recalls[0], 0.6)
    self.assertLess(recalls[1], recalls[0] - 0.2)

  @pytest.mark.slow
  def test_a_run_that_was_stopped_continues_bitwise(self):
    config = dataclasses.replace(_CONFIG, num_steps=9, checkpoint_every=4)
    data = training.split(planted(), config, 0.5)
    folders = [pathlib.Path(self.create_tempdir().full_path) for _ in "ab"]
    whole = training.train(data, folders[0])

    def stop(num_steps):
      del num_steps
      taken.append(1)
      if len(taken) == 7:  # The first call tells of no step.
        raise preemption.Stopped("now")

    taken = []
    with self.assertRaises(preemption.Stopped):
      training.train(data, folders[1], stop)
    told = []
    again = training.train(data, folders[1], told.append)
    self.assertEqual(told, [4, 1, 1, 1, 1, 1])
    chex.assert_trees_all_equal(again, whole)

  @pytest.mark.slow
  def test_held_out_texts_are_never_trained_on(self):
    data = training.split(planted(), _CONFIG, 0.25)
    self.assertEqual(data.train_rows, 192 * 32)
    np.testing.assert_array_equal(data.held_out, np.arange(192 * 32, 256 * 32))
    rows = np.random.default_rng((_CONFIG.seed, 3)).integers(
        data.train_rows, size=128
    )
    np.testing.assert_array_equal(
        data.batch(3).inputs["mlp"], data.shards.rows("mlp_in", rows)
    )
    with self.assertRaisesRegex(errors.UserError, "leaves none to train on"):
      training.split(planted(), _CONFIG, 1.0)

  def test_look_ahead_reads_a_layer_before(self):
    config = dataclasses.replace(_CONFIG, lookahead=1)
    ids = np.array([3, 700])
    now = training.split(planted(), _CONFIG, 0.5).examples(ids).inputs
    ahead = training.split(planted(), config, 0.5).examples(ids).inputs
    np.testing.assert_array_equal(ahead["mlp"], now["heads"])
    np.testing.assert_array_equal(ahead["heads"][:, 1], now["heads"][:, 0])
    np.testing.assert_array_equal(ahead["heads"][:, 0], now["heads"][:, 0])

  def test_the_loss_is_the_weighted_cross_entropy(self):
    rng = np.random.default_rng(0)
    layer = predictors.init(_CONFIG, 2, _WIDTH, 5, 2)["mlp"]
    x = rng.normal(size=(3, 2, _WIDTH)).astype(np.float32)
    truth = rng.random((3, 2, 5)) < 0.5
    weights = rng.random((2, 2)).astype(np.float32)
    expected = []
    for r, i, u in np.ndindex(3, 2, 5):
      hat = x[r, i] / np.sqrt((x[r, i] ** 2).mean())
      score = hat @ np.asarray(layer["project"][i] @ layer["expand"][i])[:, u]
      p = 1 / (1 + np.exp(-score))
      yes = truth[r, i, u]
      expected.append(-weights[int(yes), i] * np.log(p if yes else 1 - p))
    found = training.loss(
        layer, jnp.asarray(x), jnp.asarray(truth), jnp.asarray(weights)
    )
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-4)


class SaveTest(absltest.TestCase):

  def test_predictors_come_back_with_what_is_known_of_them(self):
    path = pathlib.Path(self.create_tempdir().full_path) / "p.npz"
    learned = predictors.init(_CONFIG, 2, 8 * 4, 5, 2)
    predictors.save(path, learned, {"rank": _RANK})
    found, metadata = predictors.load(path)
    chex.assert_trees_all_equal(found, learned)
    self.assertEqual(metadata, {"rank": _RANK})
    path.write_bytes(b"none")
    with self.assertRaisesRegex(errors.UserError, "holds no predictors"):
      predictors.load(path)

  def test_a_rank_above_the_width_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "rank=8 is more than the 4"):
      predictors.init(_CONFIG, 2, 4, 5, 2)


if __name__ == "__main__":
  absltest.main()
