import dataclasses
import math

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer.layers import cross_entropy
from joma.transformer.training import lm_step
from tests.joma.transformer.training.made import tiny_task


def setUpModule():
  # These tests compile much and run little.
  jax.config.update("jax_disable_most_optimizations", True)


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


def _train(task, batches):
  return tiny_task.train(tiny_task.init(task=task), batches, task=task)


class TrainTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.batches = tiny_task.draw_batches(3)
    cls.state, cls.losses = _train(tiny_task.make_task(), cls.batches)

  @pytest.mark.slow
  def test_losses_fall_on_a_batch_seen_again(self):
    again = jax.tree.map(lambda leaf: leaf[:1].repeat(3, 0), self.batches)
    _, losses = _train(tiny_task.make_task(), again)
    self.assertAlmostEqual(float(losses[0]), math.log(11), delta=1)
    self.assertTrue((np.diff(losses) < 0).all())

  def test_padding_changes_nothing(self):
    pad = lambda leaf: jnp.pad(leaf, ((0, 0), (0, 0), (0, 3)))
    padded = jax.tree.map(pad, self.batches)
    state, losses = _train(tiny_task.make_task(), padded)
    np.testing.assert_allclose(losses, self.losses, rtol=1e-5)
    chex.assert_trees_all_close(state.params, self.state.params, atol=1e-5)

  @parameterized.parameters(
      dict(grad_accum=2), dict(remat="full"), dict(loss_piece=4)
  )
  @pytest.mark.slow
  def test_saving_memory_changes_nothing(self, **change):
    # The parts of an uneven batch count by their tokens.
    weights = self.batches.weights.at[:, 0, 2:].set(0)
    uneven = self.batches._replace(weights=weights)
    expected_state, expected = _train(tiny_task.make_task(), uneven)
    state, losses = _train(tiny_task.make_task(**change), uneven)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    chex.assert_trees_all_close(state.params, expected_state.params, atol=1e-5)

  @pytest.mark.slow
  def test_bfloat16_is_near_and_keeps_float32_parameters(self):
    state, losses = _train(tiny_task.make_task(dtype="bfloat16"), self.batches)
    # 8 bits of mantissa.
    np.testing.assert_allclose(losses, self.losses, rtol=2**-6)
    self.assertGreater(np.abs(losses - self.losses).max(), 0)
    chex.assert_trees_all_equal_dtypes(state, self.state)

  @pytest.mark.slow
  def test_what_is_dropped_depends_on_the_step_alone(self):
    model = dataclasses.replace(tiny_task.CONFIG.model, dropout=0.5)
    same = jax.tree.map(lambda leaf: leaf[:1].repeat(3, 0), self.batches)
    frozen = dict(model=model, lr=1e-30)
    task = tiny_task.make_task(**frozen)
    _, losses = _train(task, same)
    self.assertGreater(np.abs(np.diff(losses)).min(), 1e-4)
    late = tiny_task.init(task=task)._replace(step=jnp.int32(2))
    _, later = tiny_task.train(late, same, task=task)
    np.testing.assert_allclose(later[0], losses[2], rtol=1e-5)

  @pytest.mark.slow
  def test_evaluation_drops_nothing_and_counts_every_token_once(self):
    model = dataclasses.replace(
        tiny_task.CONFIG.model, dropout=0.5, attn_dropout=0.5
    )
    batches = tiny_task.draw_batches(3, num_rows=2)
    weights = batches.weights.at[2, 1].set(0)
    batches = batches._replace(weights=weights)
    params = tiny_task.init(task=tiny_task.make_task()).params
    found = lm_step.evaluate(
        params, batches, task=tiny_task.make_task(model=model)
    )
    logits = tiny_task.make_task().model.apply(
        {"params": params}, batches.inputs.reshape(6, 6)
    )
    losses = cross_entropy.token_losses(logits, batches.targets.reshape(6, 6))
    np.testing.assert_allclose(found, losses[:5].mean(), rtol=1e-5)


if __name__ == "__main__":
  absltest.main()
