import itertools
import math

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from scansnap_jax import published

_LR_Z = (0.5, 1.0, 2.0, 3.0)
_RATIOS = (1.0, 2.0, 5.0, 10.0)


def _means(num_last, lr_z):
  return [
      published.figure6_cell(num_last, 2 * num_last, lr_z, ratio).mean
      for ratio in _RATIOS
  ]


class Figure6CellsTest(parameterized.TestCase):

  def test_every_pair_of_rates_is_there_once(self):
    keys = [cell[:4] for cell in published.FIGURE6_CELLS]
    expected = [
        (num_last, 2 * num_last, lr_z, ratio)
        for num_last, lr_z, ratio in itertools.product((1, 3), _LR_Z, _RATIOS)
    ]
    self.assertEqual(keys, expected)

  def test_entropies_lie_between_zero_and_that_of_ten_equal_tokens(self):
    for cell in published.FIGURE6_CELLS:
      self.assertBetween(cell.mean, 1, math.log(10))
      self.assertBetween(cell.std, 1e-3, 0.5)

  @parameterized.product(num_last=(1, 3), ratio=_RATIOS)
  def test_entropy_falls_with_the_rate_of_attention(self, num_last, ratio):
    means = [
        published.figure6_cell(num_last, 2 * num_last, lr_z, ratio).mean
        for lr_z in _LR_Z
    ]
    self.assertEqual(means, sorted(means, reverse=True))

  @parameterized.parameters(0.5, 1.0, 3.0)
  def test_entropy_rises_with_the_ratio_for_one_query(self, lr_z):
    means = _means(1, lr_z)
    self.assertEqual(means, sorted(means))

  @parameterized.parameters(*_LR_Z)
  def test_entropy_is_lowest_at_ratio_two_for_three_queries(self, lr_z):
    self.assertEqual(np.argmin(_means(3, lr_z)), 1)


class Figure6CellTest(parameterized.TestCase):

  def test_finds_rates_that_were_float32(self):
    rates = map(float, np.array([0.5, 10.0], np.float32))
    cell = published.figure6_cell(3, 6, *rates)
    self.assertEqual((cell.mean, cell.std), (2.063, 0.005))

  def test_knows_nothing_of_other_settings(self):
    self.assertIsNone(published.figure6_cell(5, 10, 0.5, 1.0))
    self.assertIsNone(published.figure6_cell(1, 2, 0.5, 3.0))
    self.assertIsNone(published.figure6_cell(1, 3, 0.5, 1.0))


class LossesTest(parameterized.TestCase):

  def test_training_from_zero_starts_at_the_entropy_of_a_uniform_guess(self):
    np.testing.assert_allclose(
        published.FIGURE4_LOSSES[0],
        np.log(published.FIGURE4_NUM_TOKENS),
        rtol=1e-6,
    )

  def test_random_start_is_near_it(self):
    # 33 tokens; parameters of size 1/sqrt(33) move the loss by a few percent.
    np.testing.assert_allclose(
        published.FIGURE6_JOB0_LOSSES[0], np.log(33), rtol=0.05
    )

  @parameterized.parameters(
      (published.FIGURE4_LOSSES,), (published.FIGURE6_JOB0_LOSSES,)
  )
  def test_even_steps_up_to_ten_then_decreasing(self, losses):
    self.assertContainsSubset(range(0, 11, 2), losses)
    early = [loss for step, loss in losses.items() if step <= 50]
    self.assertEqual(early, sorted(early, reverse=True))
    self.assertEqual([*losses], sorted(losses))


if __name__ == "__main__":
  absltest.main()
