from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax.numpy as jnp
import numpy as np

from scansnap_jax import config as config_lib
from scansnap_jax import data
from scansnap_jax import metrics

# Ten times the largest float32 error seen over 34 tokens.
_ATOL = 1e-6


def _syn_small():
  classes = data.make_classes(config_lib.DataConfig(), 2)
  attended = metrics.attended_distribution(
      jnp.zeros((34, 34)),
      jnp.asarray(classes.probs, jnp.float32),
      jnp.asarray(classes.query),
  )
  return classes, attended


class AttendedDistributionTest(parameterized.TestCase):

  def test_zero_logits_attend_to_the_probabilities(self):
    classes, attended = _syn_small()
    chex.assert_trees_all_close(
        attended, classes.probs.astype(np.float32), atol=_ATOL
    )

  def test_a_logit_moves_its_query_alone(self):
    classes, before = _syn_small()
    # Doubling e^z of token 19 (mass p = 1/15.5): p -> 2p / (1 + p).
    attn_logits = jnp.zeros((34, 34)).at[30, 19].set(jnp.log(2.0))
    after = metrics.attended_distribution(
        attn_logits,
        jnp.asarray(classes.probs, jnp.float32),
        jnp.asarray(classes.query),
    )
    np.testing.assert_allclose(after[0, 19], 2 / 16.5, rtol=1e-6)
    chex.assert_trees_all_equal(after[1], before[1])


class LeadingRankTest(absltest.TestCase):

  def test_counts_distinct_tokens_that_are_more_frequent(self):
    probs = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    is_distinct = np.array(
        [[False, True, True, True], [True, True, True, False]]
    )
    attended = np.array([[0.7, 0.05, 0.05, 0.2], [0.1, 0.2, 0.3, 0.4]])
    ranks = metrics.leading_rank(
        *map(jnp.asarray, (attended, probs, is_distinct))
    )
    np.testing.assert_array_equal(ranks, [3, 1])


class EntropyTest(parameterized.TestCase):

  def test_start_value_of_figure_4(self):
    # Weights .1 .. 1 over 5.5: 2.1513 nats; ln 10 = 2.3026 when uniform.
    classes, attended = _syn_small()
    value = metrics.distinct_entropy(attended, jnp.asarray(classes.is_distinct))
    np.testing.assert_allclose(value, 2.15128, atol=1e-5)

  def test_uniform_and_one_hot(self):
    is_distinct = jnp.ones((1, 8), bool)
    uniform = metrics.distinct_entropy(jnp.full((1, 8), 0.05), is_distinct)
    one_hot = metrics.distinct_entropy(jnp.eye(8)[:1], is_distinct)
    np.testing.assert_allclose(uniform, np.log(8), rtol=1e-6)
    np.testing.assert_allclose(one_hot, 0, atol=_ATOL)

  def test_common_tokens_change_nothing(self):
    is_distinct = jnp.array([[True, True, False]])
    values = [
        metrics.distinct_entropy(jnp.array([[0.1, 0.3, common]]), is_distinct)
        for common in (0.0, 0.6, 100.0)
    ]
    chex.assert_trees_all_equal(*values)


class CommonMassTest(parameterized.TestCase):

  def test_start_value_of_figure_4(self):
    classes, attended = _syn_small()
    value = metrics.common_mass(attended, jnp.asarray(classes.is_common))
    np.testing.assert_allclose(value, 10 / 15.5, rtol=1e-6)


class DistinctRecallTest(parameterized.TestCase):

  def test_counts_tokens_above_each_threshold(self):
    attended = jnp.array([[0.5, 0.3, 0.2, 0.0], [0.6, 0.0, 0.0, 0.4]])
    is_distinct = jnp.array([[0, 1, 1, 0], [0, 0, 0, 1]], bool)
    # Above .1: (2/2 + 1/1) / 2; above .25: (1/2 + 1) / 2; above .45: none.
    recall = metrics.distinct_recall(
        attended, is_distinct, jnp.array([0.1, 0.25, 0.45])
    )
    np.testing.assert_allclose(recall, [1, 0.75, 0])

  def test_what_only_reaches_a_threshold_is_not_above_it(self):
    attended, is_distinct = jnp.array([[0.5, 0.25, 0.25]]), jnp.array(
        [[1, 1, 0]]
    )
    recall = metrics.distinct_recall(
        attended, is_distinct.astype(bool), jnp.array([0.25, 0.5])
    )
    np.testing.assert_allclose(recall, [0.5, 0])


class SnappingTimeTest(parameterized.TestCase):

  def test_finds_the_inflection(self):
    times = jnp.linspace(0, 10, 201)
    growth = jnp.tanh(times - 4)
    np.testing.assert_allclose(
        metrics.snapping_time(times, growth), 4, atol=0.05
    )

  def test_is_the_middle_of_the_steepest_interval(self):
    times = jnp.array([0.0, 1.0, 2.0, 6.0])
    # Slopes 1, 3 and 2.
    growth = jnp.array([0.0, 1.0, 4.0, 12.0])
    self.assertEqual(metrics.snapping_time(times, growth), 1.5)


if __name__ == "__main__":
  absltest.main()
