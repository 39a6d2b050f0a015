import dataclasses

from absl.testing import absltest
import jax
import numpy as np

from joma.studies.theories import in_context
from scansnap_jax.experiment import errors
from tests.joma.studies.theories import small

_CONFIG = in_context.InContextConfig(
    spectrum=(1.0, 0.3), num_examples=5, batch_size=4000
)


class LawsTest(absltest.TestCase):

  def test_mean_loss_is_that_of_drawn_prompts(self):
    gain = np.array([[0.7, 0.2], [-0.1, 1.5]])
    x, y = in_context.Prompts(config=_CONFIG).draw(jax.random.key(0))
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    guess = np.einsum("bt,btd,de,be->b", y[:, :-1], x[:, :-1], gain, x[:, -1])
    losses = (guess / 5 - y[:, -1]) ** 2
    error = losses.std() / np.sqrt(len(losses))
    want = in_context.mean_loss(_CONFIG, gain)
    self.assertLess(abs(losses.mean() - want), 4 * error)
    self.assertLess(error, 0.06)

  def test_no_other_matrix_has_a_smaller_loss(self):
    best = in_context.optimum(_CONFIG)
    least = in_context.mean_loss(_CONFIG, best)
    self.assertAlmostEqual(least, in_context.levels(_CONFIG)[-1], places=12)
    rng = np.random.default_rng(0)
    for size in (1e-2, 1.0):
      for _ in range(20):
        other = best + size * rng.normal(size=(2, 2))
        self.assertGreater(in_context.mean_loss(_CONFIG, other), least)

  def test_a_level_is_the_least_loss_of_that_many_directions(self):
    gain = in_context.optimum(_CONFIG) * np.diag([1.0, 0.0])
    self.assertAlmostEqual(
        in_context.mean_loss(_CONFIG, gain), in_context.levels(_CONFIG)[1]
    )
    self.assertAlmostEqual(in_context.levels(_CONFIG)[0], 1.3)

  def test_the_layer_is_the_sum_over_examples(self):
    problem = in_context.Prompts(
        config=dataclasses.replace(_CONFIG, batch_size=3)
    )
    rng = np.random.default_rng(0)
    params = {"p": rng.normal(size=3), "q": rng.normal(size=(3, 3))}
    x, y = map(np.asarray, problem.draw(jax.random.key(2)))
    error = []
    for b in range(3):
      query, guess = np.append(x[b, -1], 0), 0.0
      for i in range(5):
        seen = np.append(x[b, i], y[b, i])
        guess += (params["p"] @ seen) * (seen @ params["q"] @ query) / 5
      error.append((guess - y[b, -1]) ** 2)
    loss, _ = problem.loss(params, jax.random.key(2))
    np.testing.assert_allclose(loss, np.mean(error), rtol=1e-5)


class FlowTest(absltest.TestCase):

  def test_factors_move_down_the_gradient_of_the_mean_loss(self):
    """By differences: the loss falls as the squared gradient says."""
    for is_merged in (False, True):
      losses = [
          in_context.flow(
              dataclasses.replace(_CONFIG, flow_step=step, flow_time=2 * step),
              0,
              is_merged,
          )
          for step in (1e-4, 2e-4)
      ]
      rates = [
          (loss[1] - loss[0]) / s
          for loss, s in zip(losses, (1e-4, 2e-4), strict=True)
      ]
      self.assertLess(rates[0], 0)
      np.testing.assert_allclose(rates[0], rates[1], rtol=1e-2)
      np.testing.assert_allclose(
          rates[0], -_squared_gradient(is_merged), rtol=1e-2
      )

  def test_a_flow_that_does_not_end_is_refused(self):
    config = dataclasses.replace(_CONFIG, flow_time=1.0)
    with self.assertRaisesRegex(errors.UserError, "flow_time=1"):
      in_context.waiting(config, in_context.flow(config, 0, False))

  def test_waiting_is_the_share_of_steps_near_a_level(self):
    config = in_context.InContextConfig(spectrum=(1.0, 0.5))
    first, middle, last = in_context.levels(config)
    curve = np.array([first, 0.9 * first, middle, middle, middle, last])
    self.assertAlmostEqual(in_context.waiting(config, curve), 0.75)


def _squared_gradient(is_merged):
  """Of the mean loss by all factors at the start, by central differences."""
  rng = np.random.default_rng(0)
  heads, width = _CONFIG.num_heads, 2
  draw = lambda *shape: _CONFIG.start * rng.normal(size=shape)
  if is_merged:
    factors = [draw(heads), draw(heads, width, width)]
    gain = lambda v, u: np.einsum("h,hij->ij", v, u)
  else:
    factors = [draw(heads), draw(heads, width), draw(heads, width)]
    gain = lambda v, k, q: np.einsum("h,hi,hj->ij", v, k, q)
  total, step = 0.0, 1e-6
  for which, factor in enumerate(factors):
    for place in np.ndindex(factor.shape):
      ends = []
      for sign in (1, -1):
        moved = [x.copy() for x in factors]
        moved[which][place] += sign * step
        ends.append(in_context.mean_loss(_CONFIG, gain(*moved)))
      total += ((ends[0] - ends[1]) / (2 * step)) ** 2
  return total


class StudyTest(absltest.TestCase):

  def test_runs_and_is_drawn(self):
    summary = small.measured("in_context")
    self.assertLen(summary["claims"], 4)
    figure, texts = small.drawn("in_context")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["separate", "merged", "step"], texts)


if __name__ == "__main__":
  absltest.main()
