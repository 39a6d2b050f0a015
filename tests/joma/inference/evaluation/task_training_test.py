from unittest import mock

from absl.testing import absltest
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.evaluation import task_training
from joma.inference.evaluation import tasks_symbols
from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.training import lm_step
from scansnap_jax.experiment import errors

_TINY = configs.TransformerConfig(
    vocab_size=12,
    num_layers=1,
    embed_dim=8,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    hidden_dim=8,
)


def _draw(generator):
  return tasks_symbols.mqar(generator, length=8, num_pairs=2, vocab_size=12)


class TaskTrainingTest(absltest.TestCase):

  def test_the_loss_is_of_what_is_asked_alone(self):
    # Says 0 with probability 3 / 4 and 1 with 1 / 4, always.
    logits = jnp.broadcast_to(jnp.log(jnp.array([3.0, 1.0])), (1, 4, 2))
    targets = jnp.array([[-1, 0, 1, -1]])
    tokens, model = jnp.zeros((1, 4), jnp.int32), models.Transformer(_TINY)
    want = -(np.log(0.75) + np.log(0.25)) / 2
    for extra, more in ((None, 0.0), (jnp.float32(2.0), 2.0)):
      with mock.patch.object(
          lm_step, "apply_with_losses", return_value=(logits, extra)
      ):
        found = task_training._loss({}, tokens, targets, model)
      np.testing.assert_allclose(found, want + more, rtol=1e-6)

  @pytest.mark.slow
  def test_a_seed_is_a_training_and_progress_is_told(self):
    told = []
    train = lambda seed, **more: task_training.train(
        _TINY, _draw, num_steps=27, batch_size=2, lr=0.01, seed=seed, **more
    )
    _, losses = train(0, on_progress=told.append)
    self.assertEqual(losses.shape, (27,))
    self.assertEqual(told, [25, 2])
    np.testing.assert_array_equal(train(0)[1], losses)
    self.assertGreater(np.abs(train(1)[1] - losses).max(), 1e-3)

  @pytest.mark.slow
  def test_a_rate_that_is_too_high_is_told_with_its_step(self):
    with self.assertRaisesRegex(errors.UserError, "diverged at step [0-9]+"):
      task_training.train(
          _TINY, _draw, num_steps=30, batch_size=2, lr=1e38, seed=0
      )


if __name__ == "__main__":
  absltest.main()
