from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.studies.systems.bridge import layer
from joma.studies.systems.bridge import predictors
from joma.studies.systems.bridge import training

_M = 6


def _batches(num_batches=3, size=5, length=4):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.integers(0, _M, shape), jnp.int32)
  shape = (num_batches, size)
  return training.Batches(draw(*shape, length), draw(*shape), draw(*shape))


class VelocityTest(absltest.TestCase):

  @pytest.mark.slow
  def test_is_minus_the_slope_of_the_loss_with_the_prediction_held(self):
    batches = _batches()
    one = jax.tree.map(lambda x: x[0], batches)
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
      decoder = jnp.asarray(rng.normal(size=(_M, _M)))
      alpha = jnp.asarray(rng.dirichlet(np.ones(_M), size=_M))

      def loss(attn_logits):
        logits = layer.predict(
            {"decoder": decoder}, attn_logits, *one[:2], has_residual=False
        )
        error = jax.nn.one_hot(one.label, _M) - alpha[one.query]
        return -(logits * error).sum(axis=1).mean()

      want = -jax.grad(loss)(jnp.zeros((_M, _M)))
      found = predictors.batch_velocity(one, alpha, decoder)
    np.testing.assert_allclose(found, want, atol=1e-12)

  @pytest.mark.slow
  def test_halves_meet_each_others_decoder(self):
    batches = _batches(num_batches=2)
    alpha = jnp.full((_M, _M), 1 / _M)
    one, two = (jax.tree.map(lambda x, i=i: x[i], batches) for i in range(2))

    def decoder(batch):
      total = np.zeros((_M, _M))
      for context, label in zip(batch.context, batch.label, strict=True):
        count = np.bincount(context, minlength=_M)
        error = np.eye(_M)[label] - 1 / _M
        total += np.outer(count / np.linalg.norm(count), error) / 5
      return jnp.asarray(total, jnp.float32)

    there = predictors.batch_velocity(one, alpha, decoder(two))
    back = predictors.batch_velocity(two, alpha, decoder(one))
    found = predictors.measure(batches, _M, has_residual=False)
    np.testing.assert_allclose(found.velocity, (there + back) / 2, atol=1e-6)
    size = np.sqrt((np.square(there) + np.square(back)) / 2)
    has = size > 1e-6
    np.testing.assert_allclose(
        found.over_size[has], ((there + back) / 2 / size)[has], rtol=1e-3
    )
    np.testing.assert_array_equal(
        found.sign, (np.sign(there) + np.sign(back)) / 2
    )


class SettledTest(absltest.TestCase):

  def test_knows_the_query_with_the_residual_alone(self):
    batches = _batches(num_batches=8)
    query, label = np.asarray(batches.query), np.asarray(batches.label)
    plain = predictors._alpha(batches, _M, False)
    prior = np.bincount(label.ravel(), minlength=_M) / label.size
    np.testing.assert_allclose(plain, np.tile(prior, (_M, 1)), rtol=1e-5)
    given = predictors._alpha(batches, _M, True)
    for m in range(_M):
      count = np.bincount(label[query == m], minlength=_M)
      want = (count + prior) / (count.sum() + 1)
      np.testing.assert_allclose(given[m], want, rtol=1e-5)


class RatiosTest(absltest.TestCase):

  def test_are_means_over_what_follows(self):
    rng = np.random.default_rng(3)
    context, label = rng.integers(0, 4, (30, 5)), rng.integers(0, 3, 30)
    found = predictors.ratios(context, label, 5)
    prior = np.bincount(label, minlength=5) / 30
    for token in range(5):
      count = np.zeros(5)
      for row, n in zip(context, label, strict=True):
        count[n] += (row == token).sum()
      nexts = (count + 64 * prior) / (count.sum() + 64)
      ratio = sum(nexts[n] * nexts[n] / prior[n] for n in range(3))
      logs = sum(nexts[n] * np.log(nexts[n] / prior[n]) for n in range(3))
      self.assertAlmostEqual(found["ratio"][token], ratio)
      self.assertAlmostEqual(found["log_ratio"][token], logs)
    self.assertAlmostEqual(found["ratio"][4], 1)  # Never seen.


class ScoresTest(absltest.TestCase):

  def test_go_by_the_queries_that_ask(self):
    rng = np.random.default_rng(4)
    tables = rng.normal(size=(4, _M, _M))
    rest = rng.random(size=(4, _M))
    found = predictors.Statistics(*tables, *rest)
    context, queries = np.array([[0, 5, 5]]), np.array([[1, 2]])
    said = predictors.scores(found, context, queries)
    for place, token in enumerate([0, 5, 5]):
      for name, table in (
          ("velocity", found.velocity),
          ("settled velocity", found.settled),
      ):
        want = (table[1, token] + table[2, token]) / 2
        self.assertAlmostEqual(said[name][0, place], want)
      want = sum(
          found.query_probs[m] * found.velocity[m, token] for m in range(_M)
      )
      self.assertAlmostEqual(said["velocity by type"][0, place], want)
      self.assertEqual(
          said["minus frequency"][0, place], -found.frequency[token]
      )


if __name__ == "__main__":
  absltest.main()
