"""Mixtures of heads: gates by hand, balance, and what is not chosen."""

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np
import pytest

from joma.systems.routers import head_gates
from scansnap_jax.experiment import errors
from tests.joma.systems import one_layer


def _softmax(x):
  raised = np.exp(x - x.max(axis=-1, keepdims=True))
  return raised / raised.sum(axis=-1, keepdims=True)


def _by_hand(params, x, active, factor=None):
  """Gates of shared heads and of the `active` greatest of the others."""
  own = {name: np.float64(kernel) for name, kernel in params.items()}
  probs = _softmax(x @ own["routed"])
  least = np.sort(probs, axis=-1)[..., -active][..., None]
  kept = np.where(probs >= least, probs, 0)
  routed = (factor or active) * kept / kept.sum(axis=-1, keepdims=True)
  shared = own["shared"].shape[1] * _softmax(x @ own["shared"])
  beta = 2 * _softmax(x @ own["balance"])
  return np.concatenate([beta[..., :1] * shared, beta[..., 1:] * routed], -1)


class MohTest(parameterized.TestCase):

  def test_gates_are_those_of_the_equation(self):
    config, params, x = one_layer.draw("moh:shared=2:active=1")
    plain = one_layer.head_out(one_layer.CONFIG, params, x)
    got = one_layer.head_out(config, params, x)
    want = _by_hand(params["moh"], np.float64(x), 1)
    np.testing.assert_allclose(got, want[..., None] * plain, atol=1e-5)
    self.assertEqual((want == 0).sum(), x.shape[0] * x.shape[1])

  @pytest.mark.slow
  def test_all_heads_and_a_router_of_zeros_are_multi_head_attention(self):
    config, params, x = one_layer.draw("moh:shared=2:active=2:start=0")
    plain = one_layer.head_out(one_layer.CONFIG, params, x)
    got = one_layer.head_out(config, params, x)
    np.testing.assert_allclose(got, plain, atol=1e-6)
    # The twin forgets K: half of the routed heads.
    twin = _by_hand(params["moh"], np.float64(x), 2, factor=1)
    self.assertGreater(np.abs(twin[..., None] * plain - plain).max(), 0.1)

  @parameterized.parameters(1, 2, 3)
  def test_balance_is_k_where_routing_is_uniform(self, active):
    seen = jnp.ones((2, 3), bool)
    x = jnp.tile(jnp.eye(3)[None], (2, 1, 1))
    for router in (
        jnp.zeros((3, 3)),
        4 * jnp.eye(3) + jnp.roll(jnp.eye(3), 1, 1),
    ):
      found = head_gates.imbalance({"routed": router}, x, active, seen)
      self.assertAlmostEqual(float(found), active, places=5)
    # All tokens want the same head: E times as much for K = 1.
    alike = jnp.zeros((3, 3)).at[:, 0].set(30.0)
    found = float(head_gates.imbalance({"routed": alike}, x, 1, seen))
    self.assertAlmostEqual(found, 3, places=4)
    # Padding chooses nothing.
    half = seen.at[1, 1:].set(False)
    other = head_gates.imbalance({"routed": alike}, x, 1, half)
    self.assertAlmostEqual(float(other), 3, places=4)

  @pytest.mark.slow
  def test_the_loss_is_sown_by_its_factor(self):
    config, params, x = one_layer.draw("moh:shared=1:active=2:start=0:cost=0.5")
    _, seen = one_layer.run(config, params, x)
    self.assertAlmostEqual(float(seen["moh_balance"]), 0.5 * 2, places=6)

  @pytest.mark.slow
  def test_values_of_a_head_that_is_not_chosen_change_nothing(self):
    config, params, x = one_layer.draw("moh:shared=1:active=1")
    gates = np.asarray(head_gates.gates_of(params["moh"], x, 1))
    out, _ = one_layer.run(config, params, x)
    changed = params["out"]["kernel"].at[2].mul(100.0)
    other, _ = one_layer.run(config, params | {"out": {"kernel": changed}}, x)
    is_chosen = gates[..., 2] > 0
    self.assertTrue(0 < is_chosen.mean() < 1)
    np.testing.assert_array_equal(out[~is_chosen], other[~is_chosen])
    moved = np.abs(out - other).max(axis=-1)
    self.assertTrue((moved[is_chosen] > 0).all())

  @parameterized.parameters(
      ("moh:active=0", "active must be at least 1, got 0"),
      ("moh:shared=4", "shared=4 leaves none of num_heads=4"),
      ("moh:cost=-1", "cost must be finite and not negative, got -1"),
  )
  def test_says_what_would_be_right(self, entry, message):
    with self.assertRaisesRegex(errors.UserError, message):
      one_layer.draw(entry)


if __name__ == "__main__":
  absltest.main()
