import dataclasses

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from joma.studies import training
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True)
class _Line:
  """Finds the slope 2 of a line."""

  def init(self, key):
    return {"slope": jax.random.normal(key, ())}

  def loss(self, params, key):
    x = jax.random.normal(key, (8,))
    error = jnp.square((params["slope"] - 2) * x).mean()
    return error, -error


class _TwoScores(_Line):
  """Follows two scores."""

  def loss(self, params, key):
    error, score = super().loss(params, key)
    return error, jnp.stack([score, 4 * score])


def _train(seeds=(0, 1, 2), rate=0.1, **changes):
  schedule = dict(num_steps=120, num_records=12) | changes
  return training.train(
      _Line(), seeds, schedule=training.Schedule(**schedule), rate=rate
  )


class TrainTest(absltest.TestCase):

  def test_every_seed_learns_and_gives_the_same_again(self):
    trained = _train()
    self.assertEqual(trained.losses.shape, (3, 12))
    np.testing.assert_array_equal(trained.steps, 10 * np.arange(1, 13))
    # Drawn at first; 120 steps at this rate come so near.
    np.testing.assert_allclose(trained.params["slope"], 2, atol=0.1)
    one = _train(seeds=(1,))
    np.testing.assert_array_equal(one.losses[0], trained.losses[1])

  def test_a_run_ends_where_its_loss_is_low_enough(self):
    whole, short = _train(), _train(target_loss=0.3)
    self.assertTrue((short.num_steps < 120).all())
    for run, end in enumerate(short.num_steps):
      last = end // 10 - 1
      np.testing.assert_array_equal(
          short.losses[run, : last + 1], whole.losses[run, : last + 1]
      )
      # Below at the end, never before; then all stays as it is.
      self.assertLess(short.losses[run, last], 0.3)
      self.assertTrue((short.losses[run, :last] >= 0.3).all())
      self.assertLen(set(short.losses[run, last:].tolist()), 1)

  def test_scores_are_followed_in_their_own_shape_and_end_a_run_together(self):
    schedule = training.Schedule(
        num_steps=120, num_records=12, target_score=-0.5
    )
    run = lambda problem: training.train(
        problem, (0, 1), schedule=schedule, rate=0.1
    )
    one, two = run(_Line()), run(_TwoScores())
    self.assertEqual(two.scores.shape, (2, 12, 2))
    # The second score is further from its end at first: four times as far.
    np.testing.assert_allclose(4 * two.scores[..., 0], two.scores[..., 1])
    self.assertTrue((two.num_steps >= one.num_steps).all())
    for scores, end in zip(two.scores, two.num_steps, strict=True):
      last = end // 10 - 1
      self.assertTrue((scores[last] > -0.5).all())
      self.assertTrue((scores[:last].min(axis=1) <= -0.5).all())

  def test_the_first_record_above_a_score_is_found(self):
    trained = _train()._replace(
        scores=np.array([[0.1] * 12, [0.1] * 4 + [0.9] * 8])
    )
    steps, count = training.first_above(trained, 0.5)
    np.testing.assert_array_equal(steps, [120, 50])
    self.assertEqual(count, 1)

  def test_what_diverged_is_no_finding(self):
    with self.assertRaisesRegex(errors.UserError, "diverged from seed 0"):
      _train(rate=1e30)


if __name__ == "__main__":
  absltest.main()
