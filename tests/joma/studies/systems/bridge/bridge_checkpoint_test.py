import dataclasses
from unittest import mock

from absl.testing import absltest
import numpy as np
import pytest

from joma.inference.bridge import text as bridge_text
from joma.inference.bridge import theory
from joma.studies.systems.bridge import bridge_checkpoint
from scansnap_jax.experiment import errors
from tests.joma.studies.systems import small

_CONFIG = bridge_checkpoint.BridgeCheckpointConfig(
    num_texts=3,
    num_calibration=2,
    length=16,
    num_sinks=2,
    num_windows=8,
    vocab_size=12,
)


class StatisticsTest(absltest.TestCase):

  def test_types_are_the_most_frequent_ids_and_one_for_all_others(self):
    train = np.repeat(np.arange(100, 120), np.arange(20, 0, -1))
    ids = bridge_checkpoint._compact(_CONFIG, train)
    np.testing.assert_array_equal(ids[100:111], np.arange(11))
    np.testing.assert_array_equal(ids[[111, 119, 5, 50_000]], 11)

  def test_velocity_is_that_of_the_queries_that_ask(self):
    rng = np.random.default_rng(0)
    train, texts = rng.integers(12, size=400), rng.integers(12, size=(3, 16))
    found = bridge_checkpoint._statistics_of(_CONFIG, train, texts, slice(2, 8))
    ids = bridge_checkpoint._compact(_CONFIG, train)
    windows = bridge_text.cut(train, 16, 8, "training")
    velocity = theory.growth(ids[windows], 12).velocity
    for b, text in enumerate(ids[texts]):
      for c, key in enumerate(text[2:8]):
        expected = np.mean([velocity[query, key] for query in text[8:]])
        self.assertAlmostEqual(found["velocity"][b, c], expected)
        count = np.mean(ids[train] == key)
        self.assertAlmostEqual(found["frequency"][b, c], count)
        self.assertAlmostEqual(found["minus frequency"][b, c], -count)


class MeasureTest(absltest.TestCase):

  def test_a_model_that_attends_by_frequency_is_found_by_frequency(self):
    config = dataclasses.replace(_CONFIG, vocab_size=256, num_texts=8)
    train = bridge_checkpoint.corpus_lib.load(tokenizer="bytes").train
    ids = bridge_checkpoint._compact(config, train)
    count = np.bincount(ids[train], minlength=256).astype(float)

    def read(_, params, tokens):
      del params
      by_type = count[ids[tokens[:, :8]]]
      by_type[:, :2] = 1e9  # Sinks, which would come first.
      mass = np.repeat(by_type[:, None], 8, axis=1)
      return mass, mass * np.arange(8, 0, -1)

    with mock.patch.object(bridge_text, "read", read):
      found = bridge_checkpoint.measure(config)
    recalls = {
        name: np.array(values)
        for name, values in found["rows"]["untrained"].items()
    }
    self.assertEqual(recalls["frequency"].shape, (8, 2))
    self.assertEqual(found["chance"], 2 / 6)
    # Types that stand twice share what is left.
    self.assertGreater(recalls["frequency"].mean(), 0.8)
    self.assertLess(recalls["minus frequency"].mean(), 0.1)
    np.testing.assert_array_equal(recalls["running mean"], recalls["frequency"])
    self.assertGreater(recalls["type"].mean(), recalls["velocity"].mean())

  @pytest.mark.slow
  def test_a_small_study_has_an_untrained_model_alone(self):
    summary = small.measured("bridge_checkpoint")
    self.assertEqual([*summary["rows"]], ["untrained"])
    (claim,) = summary["claims"]
    self.assertIn("untrained", claim["claim"])
    self.assertLen(summary["table"], len(summary["rows"]["untrained"]))

  @pytest.mark.slow
  def test_a_figure_has_a_panel_a_model(self):
    figure, texts = small.drawn("bridge_checkpoint")
    self.assertLen(figure.axes, 1)
    self.assertIn("untrained", texts)

  def test_bad_sizes_are_named(self):
    for sizes, told in (
        (dict(length=16, num_sinks=7), "num_sinks"),
        (dict(budget=1.0), "budget"),
        (dict(vocab_size=1), "vocab_size"),
    ):
      with self.subTest(told), self.assertRaisesRegex(errors.UserError, told):
        bridge_checkpoint.BridgeCheckpointConfig(**sizes)


if __name__ == "__main__":
  absltest.main()
