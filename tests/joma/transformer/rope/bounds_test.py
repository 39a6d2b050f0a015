"""Tests of the bound on the error of position interpolation."""

import math

from absl.testing import absltest
from absl.testing import parameterized
import hypothesis
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer.rope import bounds
from joma.transformer.rope import rotary

_THETA = 10_000.0
# Rounding of float64 scores of size 1 at d = 128.
_ATOL = 1e-12


def _score(products, distance, theta=_THETA):
  """Computes a(x) in float64 from h [R]."""
  num_pairs = len(products)
  turns = theta ** (-np.arange(num_pairs) / num_pairs)
  return np.sum(products * np.exp(1j * distance * turns)).real


def _error(products, start, fraction, theta=_THETA):
  """Computes a - chord at start + fraction."""
  left, right = (_score(products, start + x, theta) for x in (0, 1))
  chord = (1 - fraction) * left + fraction * right
  return _score(products, start + fraction, theta) - chord


class InterpolationErrorBoundTest(parameterized.TestCase):

  @hypothesis.settings(derandomize=True, deadline=None, max_examples=300)
  @hypothesis.given(
      seed=st.integers(0, 2**32 - 1),
      num_pairs=st.integers(1, 64),
      theta=st.floats(1.5, 1e6),
      start=st.integers(0, 4096),
      fraction=st.floats(0, 1),
      aligned=st.booleans(),
  )
  @pytest.mark.slow
  def test_scores_stay_within_the_bound_of_the_chord_on_both_sides(
      self, seed, num_pairs, theta, start, fraction, aligned
  ):
    rng = np.random.default_rng(seed)
    query, key = rng.normal(size=(2, num_pairs, 2)) @ np.array([1, 1j])
    products = query * key.conj()
    if aligned:  # The most curved score there is: every pair bends together.
      turns = theta ** (-np.arange(num_pairs) / num_pairs)
      products = np.exp(-1j * (start + 0.5) * turns)
    bound = np.abs(products).max() * bounds.interpolation_error_bound(
        2 * num_pairs, theta, fraction
    )
    slack = _ATOL * np.abs(products).sum()
    error = _error(products, start, fraction, theta)
    self.assertLessEqual(error, bound + slack)
    self.assertGreaterEqual(error, -bound - slack)
    error = _error(-products, start, fraction, theta)
    self.assertLessEqual(error, bound + slack)

  @parameterized.parameters(64, 128)
  def test_bound_is_nearly_reached(self, rotary_dim):
    # Curvature changes little within a step: most of the bound is used.
    error = abs(_error(np.ones(rotary_dim // 2), 0, 0.5))
    bound = bounds.interpolation_error_bound(rotary_dim, _THETA, 0.5)
    self.assertBetween(error / bound, 0.9, 1.0)

  @parameterized.parameters((64, 1.246), (128, 1.096))
  def test_bound_with_the_integral_in_place_of_the_sum_fails(
      self, rotary_dim, expected
  ):
    quoted = lambda x: rotary_dim * x * (1 - x) / (8 * math.log(_THETA))
    ratios = [
        abs(_error(np.ones(rotary_dim // 2), 0, x)) / quoted(x)
        for x in np.linspace(0.01, 0.99, 99)
    ]
    self.assertAlmostEqual(max(ratios), expected, delta=2e-3)

  def test_unseen_distances_reach_128_times_the_bound(self):
    turns = _THETA ** (-np.arange(64) / 64)
    reached = _score(np.exp(-1j * 5000.0 * turns), 5000.0)
    self.assertAlmostEqual(reached, 64, delta=1e-9)
    bound = bounds.interpolation_error_bound(128, _THETA, 0.5)
    self.assertAlmostEqual(reached / bound, 128, delta=0.1)

  @pytest.mark.slow
  def test_bound_holds_for_scores_of_rotated_queries_and_keys(self):
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 64)).astype(np.float32)

    def scores(config, num_positions):
      inv_freq, _ = rotary.frequencies(config, 64, max_len=128)
      turned = rotary.rotate(
          jnp.tile(query, (1, num_positions, 1, 1)),
          jnp.arange(num_positions)[None],
          inv_freq,
      )
      return np.asarray(turned[0, :, 0] @ key, np.float64)

    stretched = {"rope_type": "linear", "factor": 4.0}
    plain, stretched = scores({}, 129), scores(stretched, 4 * 128)
    quarters = np.arange(4 * 128) / 4
    chord = np.interp(quarters, np.arange(129), plain)
    pairs = lambda x: x[:32] + 1j * x[32:]
    bound = np.abs(pairs(query) * pairs(key).conj()).max() * np.array(
        [bounds.interpolation_error_bound(64, _THETA, x) for x in quarters % 1]
    )
    # Rounding of float32 angles of 128 times scores of 20.
    self.assertTrue(np.all(np.abs(stretched - chord) <= bound + 2e-4))
    # The whole distances are those of training; between them, scores bend.
    np.testing.assert_allclose(stretched[::4], plain[:128], atol=2e-4)
    self.assertGreater(np.abs(stretched - chord).max(), 0.05)


if __name__ == "__main__":
  absltest.main()
