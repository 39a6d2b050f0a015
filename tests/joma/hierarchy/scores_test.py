import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.hierarchy import scores

# Correlations add 60 products of order 1 in float32.
_ATOL = 2e-6


def _draw(seed=0, num_sequences=20, num_nodes=30, num_latents=5):
  rng = np.random.default_rng(seed)
  pooled = np.maximum(rng.normal(1, 1, (num_sequences, num_nodes)), 0)
  activity = rng.random((num_sequences, num_latents)) < 0.3
  activity[0], activity[1] = True, False  # None is constant.
  return pooled.astype(np.float32), activity


def _correlations(*args):
  return np.asarray(scores.correlations(*map(jnp.asarray, args)))


class CorrelationsTest(parameterized.TestCase):

  def test_equal_those_of_numpy(self):
    pooled, activity = _draw()
    both = np.corrcoef(activity, pooled, rowvar=False)[:5, 5:]
    np.testing.assert_allclose(
        _correlations(pooled, activity), both, atol=_ATOL
    )

  def test_weights_are_repetitions(self):
    pooled, activity = _draw()
    counts = np.arange(20) % 4  # Some weigh nothing.
    repeated = [np.repeat(x, counts, axis=0) for x in (pooled, activity)]
    np.testing.assert_allclose(
        _correlations(
            pooled, activity, (counts / counts.sum()).astype(np.float32)
        ),
        _correlations(*repeated),
        atol=_ATOL,
    )

  @parameterized.parameters(0.0, 0.3, 7.7)
  @pytest.mark.by_default(0, 1)
  def test_a_constant_node_or_latent_scores_zero(self, value):
    pooled, activity = _draw(num_sequences=19)
    # The padding that all sequences share may be the maximum of a node in all.
    pooled[:, 3] = value * (1 + 1e-7 * np.arange(19))
    activity[:, 1], activity[:, 2] = True, False
    found = _correlations(pooled, activity)
    np.testing.assert_array_equal(found[:, 3], 0)
    np.testing.assert_array_equal(found[1:3], 0)
    self.assertGreater(np.abs(found[[0, 3, 4]][:, :3]).min(), 0)

  def test_a_node_that_is_the_latent_up_to_scale_scores_one(self):
    pooled, activity = _draw()
    pooled[:, 4] = 3 + 0.01 * activity[:, 2]
    pooled[:, 5] = 3 - 0.01 * activity[:, 2]
    found = _correlations(pooled, activity)[2]
    # 3 leaves .01 with a relative rounding of 1e-5.
    np.testing.assert_allclose(found[4:6], [1, -1], atol=1e-4)


_score = jax.jit(scores.score, static_argnames="num_shuffles")


@functools.cache
def _found():
  weights = np.where(np.arange(60) < 40, 1 / 40, 0).astype(np.float32)
  args = map(jnp.asarray, (*_draw(), *_draw(1, 60), weights))
  return _score(jax.random.key(0), *args, num_shuffles=400)


class ScoreTest(parameterized.TestCase):

  def test_own_is_the_best_node_of_the_classes(self):
    pooled, activity = _draw()
    both = np.corrcoef(activity, pooled, rowvar=False)[:5, 5:]
    np.testing.assert_allclose(_found().own, both.max(axis=1), atol=_ATOL)

  def test_transferred_is_that_node_elsewhere(self):
    pooled, activity = _draw()
    both = np.corrcoef(activity, pooled, rowvar=False)[:5, 5:]
    unseen, held = (x[:40] for x in _draw(1, 60))
    elsewhere = np.corrcoef(held, unseen, rowvar=False)[:5, 5:]
    np.testing.assert_allclose(
        _found().unseen, elsewhere.max(axis=1), atol=_ATOL
    )
    expected = elsewhere[np.arange(5), both.argmax(axis=1)]
    np.testing.assert_allclose(_found().transferred, expected, atol=_ATOL)
    self.assertLess(np.max(_found().transferred), np.min(_found().own))

  def test_shuffled_is_the_best_node_for_permuted_latents(self):
    pooled, activity = _draw()
    rng = np.random.default_rng(5)
    maxima = []
    for _ in range(400):
      permuted = activity[rng.permutation(20)]
      both = np.corrcoef(permuted, pooled, rowvar=False)[:5, 5:]
      maxima.append(both.max(axis=1))
    # Means over 400 permutations each.
    error = np.std(maxima, axis=0) * np.sqrt(2 / 400)
    difference = np.abs(_found().shuffled - np.mean(maxima, axis=0))
    self.assertLess(np.max(difference / error), 4.5)

  def test_a_network_that_found_the_latents_stands_out(self):
    pooled, activity = _draw()
    unseen, held = _draw(1, 60)
    pooled[:, 10:15], unseen[:, 20:25] = activity, held
    args = (pooled, activity, unseen, held, np.full(60, 1 / 60, np.float32))
    found = _score(jax.random.key(0), *map(jnp.asarray, args), num_shuffles=20)
    np.testing.assert_allclose(found.own, 1, atol=_ATOL)
    # Found on the classes alone, by nodes that do something else elsewhere.
    self.assertLess(np.max(found.transferred), 0.5)
    np.testing.assert_allclose(found.unseen, 1, atol=_ATOL)
    self.assertLess(np.max(found.shuffled), 0.9)
    unseen[:, 10:15] = held
    found = _score(jax.random.key(0), *map(jnp.asarray, args), num_shuffles=20)
    np.testing.assert_allclose(found.transferred, 1, atol=_ATOL)


class PoolTest(absltest.TestCase):

  def test_is_the_largest_over_positions(self):
    hidden = jnp.array([[[1.0, 5.0], [3.0, 2.0]]])
    np.testing.assert_array_equal(scores.pool(hidden), [[3, 5]])


if __name__ == "__main__":
  absltest.main()
