from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np

from joma.systems.reuse import distillation
from scansnap_jax.experiment import errors


class TrainTest(parameterized.TestCase):

  def _train(self, losses, weight):
    """What training makes of steps that are given."""
    params = {"a": jnp.zeros(2), "b": jnp.full(3, weight)}
    steps = [(params, None, jnp.float32(loss)) for loss in losses]
    with mock.patch.object(distillation, "_step", side_effect=steps):
      texts = np.zeros((len(losses), 1, 2), np.int32)
      return distillation.train(None, jnp.zeros(3), texts, 0.25)

  def test_losses_and_the_last_parameters(self):
    params, losses = self._train([3.0, 2.0], 5.0)
    np.testing.assert_array_equal(params["b"], jnp.full(3, 5.0))
    self.assertEqual(losses, [3.0, 2.0])

  @parameterized.parameters(
      ([5.5, 56.0], 1.0, "from 5.5 to 56"),
      ([5.5, np.nan], 1.0, "from 5.5 to nan"),
      # The loss of a guess, which a norm makes of activations of any size.
      ([5.5, 5.5], 2e19, "became 2e.19"),
      ([5.5, 5.5], -2e19, "became 2e.19"),
      ([5.5, 5.5], np.nan, "became nan"),
      ([5.5, 5.5], np.inf, "became inf"),
  )
  def test_what_diverged_is_refused(self, losses, weight, said):
    with self.assertRaisesRegex(
        errors.UserError, f"diverged with rate=0.25: .*{said}"
    ):
      self._train(losses, weight)


if __name__ == "__main__":
  absltest.main()
