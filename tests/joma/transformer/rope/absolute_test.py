from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np

from joma.transformer import config as configs
from joma.transformer.rope import absolute
from scansnap_jax.experiment import errors


class SinusoidsTest(parameterized.TestCase):

  def test_by_hand(self):
    # D = 4: angles t and t / 100, each with its sine and cosine.
    got = absolute.sinusoids(jnp.array([[0, 2]]), 4)
    want = [[0, 1, 0, 1], [np.sin(2), np.cos(2), np.sin(0.02), np.cos(0.02)]]
    np.testing.assert_allclose(got[0], want, atol=1e-6)


class CheckLearnedPositionsTest(parameterized.TestCase):

  def test_learned_positions_end_where_the_model_does(self):
    config = configs.TransformerConfig(max_len=12, positions="learned")
    absolute.check_learned_positions(config, 12)
    with self.assertRaisesRegex(errors.UserError, "12 learned.* asked for 13:"):
      absolute.check_learned_positions(config, 13)

  def test_others_go_on(self):
    config = configs.TransformerConfig(max_len=12, positions="sinusoidal")
    absolute.check_learned_positions(config, 10**6)


if __name__ == "__main__":
  absltest.main()
