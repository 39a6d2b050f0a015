"""Needle chunks among filler, what a router keeps, and bytes of caches."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import pytest

from joma.studies.systems.routing import nats
from joma.studies.systems.routing import needle_chunks
from scansnap_jax.experiment import errors
from tests.joma.studies.systems import small


class NatsTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("nats")
    self.assertLen(summary["claims"], 3)
    rows = summary["rows"]
    self.assertEqual([*rows], [*nats.MODELS])
    # Not trained, routes are those before training.
    self.assertEqual(rows["nats"]["before"]["auc"], rows["nats"]["auc"])
    # So short a text has fewer bytes of keys than the router of states: all.
    self.assertEqual(rows[nats.WINDOW]["num_keys"], 3 * 2 + 2)
    figure, texts = small.drawn("nats")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["needle", "filler", "step"], texts)


class NeedlesTest(absltest.TestCase):

  def test_pairs_stand_in_needle_chunks_and_are_asked(self):
    task = needle_chunks.Needles(
        chunk=4, num_chunks=5, num_needles=2, num_asked=2, num_symbols=6
    )
    # One program compiles sooner than its operations.
    draw = jax.jit(task.drawn, static_argnums=1)
    found, needles = draw(jax.random.key(0), 3)
    tokens, targets, is_asked, is_scored = map(np.asarray, found)
    self.assertEqual(tokens.shape, (3, 5 * 4 + 2 * 2 * 4))
    np.testing.assert_array_equal(np.asarray(needles).sum(axis=1), 2)
    for row in range(3):
      chunks = tokens[row, :20].reshape(5, 4)
      inside = chunks[np.asarray(needles)[row]].reshape(-1, 2)
      value_of = dict(inside.tolist())
      self.assertLen(value_of, 4)
      self.assertTrue((inside[:, 0] < 6).all())
      self.assertTrue(((inside[:, 1] >= 6) & (inside[:, 1] < 12)).all())
      filler = chunks[~np.asarray(needles)[row]]
      self.assertTrue((filler >= 12).all() and (filler < 18).all())
      np.testing.assert_array_equal(filler, filler[:, :1].repeat(4, axis=1))
      places = np.flatnonzero(is_asked[row])
      np.testing.assert_array_equal(places, np.arange(20, 36, 2))
      first = np.flatnonzero(is_scored[row])
      np.testing.assert_array_equal(first, np.arange(20, 28, 2))
      for place in places:
        want = value_of[tokens[row, place]]
        self.assertEqual(targets[row, place], want)
        self.assertEqual(tokens[row, place + 1], want)
      # Every key once, then every key again.
      for part in (places[:4], places[4:]):
        self.assertEqual({*tokens[row, part].tolist()}, {*value_of})


class KeptTest(parameterized.TestCase):

  def test_is_told_of_chunks_before_what_is_asked(self):
    prob = np.array([[0.9, 0.2, 0.6, 0.7], [0.4, 0.3, 0.1, 0.8]])
    is_needle = np.array([[True, False, False], [False, True, False]])
    found = nats.kept(prob, is_needle)
    # .9 is above .2, .6, .4, .1; .3 above .2 and .1 of them.
    self.assertAlmostEqual(found["auc"], (4 + 2) / 8)
    self.assertEqual(found["needle"], 0.5)
    self.assertEqual(found["filler"], 0.25)
    self.assertEqual(found["num_kept"], 1)  # Two, and none.

  def test_bytes_are_counted_by_hand(self):
    config = nats.NatsConfig(width=16, chunk=4)
    # One head of 8 channels, float32; 3 newest queries, keys and values.
    pair, newest, state = 2 * 8 * 4, 3 * 3 * 8 * 4, 8 * 8 * 4
    window = nats.learner(config, nats.WINDOW).model
    self.assertEqual(nats.cache_bytes(window, 5), 5 * pair + newest)
    hybrid = nats.learner(config, nats.HYBRID).model
    self.assertEqual(
        nats.cache_bytes(hybrid, 5), 5 * pair + 4 * newest + 3 * state
    )
    routed = nats.learner(config, nats.ROUTED).model
    # Two states, chunks of 4 keys and the one that grows; its inputs' sum, the
    # sum of its decays, its length, and how many are kept and lost.
    rest = 4 * (16 + 1 + 1 + 1 + 1)
    want = (2 + 1) * 4 * pair + newest + 2 * state + rest
    self.assertEqual(nats.routed_bytes(routed, 2.0), want)
    self.assertEqual(nats.routed_bytes(routed, 0.5), want - 6 * pair)

  @parameterized.parameters(nats.WINDOW, nats.HYBRID)
  def test_a_window_is_the_least_with_as_many_bytes(self, name):
    model = nats.learner(nats.NatsConfig(), name).model
    for num_bytes in (14_000, 14_001, 14_255):
      num_keys = nats.keys_within(model, num_bytes)
      self.assertGreaterEqual(nats.cache_bytes(model, num_keys), num_bytes)
      if num_keys > 1:
        self.assertLess(nats.cache_bytes(model, num_keys - 1), num_bytes)
    self.assertEqual(nats.keys_within(model, 0), 1)
    self.assertEqual(nats.keys_within(model, 10**9), model.max_len)

  @parameterized.parameters(
      (dict(num_chunks=1), "num_chunks must be from 2 to"),
      (dict(chunk=7), "chunk must be a multiple of 2, got 7"),
      (dict(others=("moh",)), "others must be one or more of sliding window"),
      (dict(num_symbols=3), "num_symbols must be from 4 to"),
  )
  def test_says_what_would_be_right(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      nats.NatsConfig(**changes)


if __name__ == "__main__":
  absltest.main()
