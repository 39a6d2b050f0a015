"""Gated convolutions: the equation, and how far back they read."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.systems.mixers.convolutions import gated_conv
from kernels_pallas import masks
from tests.joma.systems import one_layer


def _by_hand(params, x):
  """Heads' outputs of one text [T, D], token by token, in float64."""
  own = {name: np.float64(leaf) for name, leaf in params["gated_conv"].items()}
  project = lambda name: np.einsum(
      "TD,DNH->TNH", np.float64(x), np.float64(params[name]["kernel"])
  )
  query, key, value = (project(name) for name in ("query", "key", "value"))
  key, value = (np.repeat(rows, 2, axis=1) for rows in (key, value))
  inner = np.float64(jax.nn.gelu(jnp.asarray(value)))
  near, made = np.zeros_like(inner), np.zeros_like(inner)
  for t in range(len(x)):
    for u in range(5):
      near[t] += own["near"][u] * (inner[t - u] if t >= u else 0)
  for t in range(len(x)):
    for u in range(7):
      made[t] += own["far"][u] * (near[t - 3 * u] if t >= 3 * u else 0)
  product = lambda name: np.einsum("TNH,NHMJ->TMJ", made, own[name])
  gate = 1 / (1 + np.exp(-product("gate") - query))
  return gate * (product("feature") + key)


class GatedConvTest(absltest.TestCase):

  def test_one_pass_is_the_equation(self):
    config, params, x = one_layer.draw("gated_conv", length=30)
    got = one_layer.head_out(config, params, x)
    np.testing.assert_allclose(got[1], _by_hand(params, x[1]), atol=1e-5)

  @pytest.mark.slow
  def test_it_reads_22_tokens_back_and_no_farther(self):
    config, params, x = one_layer.draw("gated_conv", length=30)
    moved = np.abs(
        one_layer.head_out(config, params, x.at[:, 3].add(1.0))
        - one_layer.head_out(config, params, x)
    ).max(axis=(0, 2, 3))
    self.assertEqual(gated_conv.REACH, 22)
    np.testing.assert_array_equal(moved[:3], 0)
    self.assertTrue((moved[3:26] > 0).all())
    np.testing.assert_array_equal(moved[26:], 0)

  @pytest.mark.slow
  def test_packed_documents_are_those_alone(self):
    config, params, x = one_layer.draw("gated_conv", length=30)
    ids = jnp.array([[0] * 7 + [1] * 23, [0] * 30])
    got = one_layer.head_out(
        config, params, x, 0, "reference", masks.document(ids)
    )
    for start, stop in ((0, 7), (7, 30)):
      want = _by_hand(params, x[0, start:stop])
      np.testing.assert_allclose(got[0, start:stop], want, atol=1e-5)


if __name__ == "__main__":
  absltest.main()
