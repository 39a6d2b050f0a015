"""The law of dilution, and temperatures beside the equation."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.systems.score_rules import ssa
from joma.transformer import attention
from joma.transformer import config as configs
from kernels_pallas import masks
from tests import draws

_TOLERANCE = 1e-6


def _mass(tau, c, n):
  """Weight of a key that leads n - 1 equal ones by c, in float64."""
  return 1 / (1 + np.exp(np.log(n - 1) - tau * c))


class DilutionTest(parameterized.TestCase):

  @parameterized.parameters(
      (0.5, 0.0), (1.0, 1 / (1 + np.exp(-4.0))), (1.5, 1.0)
  )
  @pytest.mark.by_default(0, 1)
  def test_the_limit_turns_at_a_margin_of_one(self, a_c, limit):
    """Below, at and above a c = 1; the twin has its temperature on weights."""
    c, n = 4.0, 10.0**18
    alpha = np.log(a_c / c / (1 - a_c / c))
    params = {"query_alpha": jnp.array([alpha])}
    for num_seen in (3, 1000):
      tau = ssa.temperature(
          params, "query", jnp.zeros((1, 1, 2)), jnp.array([[num_seen]])
      )
      want = 1 + a_c / c * np.log(num_seen)
      np.testing.assert_allclose(tau[0, 0, 0], want, rtol=_TOLERANCE)
      logits = float(tau[0, 0, 0]) * c * (np.arange(num_seen) == 1)
      weights = np.exp(logits) / np.exp(logits).sum()
      np.testing.assert_allclose(
          weights[1], _mass(want, c, num_seen), atol=_TOLERANCE
      )
    at_n = _mass(1 + a_c / c * np.log(n), c, n)
    np.testing.assert_allclose(at_n, limit, atol=_TOLERANCE)
    twin = min((1 + a_c / c * np.log(n)) * _mass(1, c, n), 1)
    self.assertLess(twin, _TOLERANCE)  # It stays diluted, whatever a.

  @parameterized.parameters(
      (0.1, 0.0), (1.0, 1 / (1 + np.exp(-4.0))), (1.9, 1.0)
  )
  @pytest.mark.by_default(1)
  def test_its_own_temperature_comes_to_the_limits(self, a_c, limit):
    """As many tokens as an int32 counts; plain softmax has come to 0."""
    c, n = 4.0, 2**31 - 1
    alpha = np.log(a_c / c / (1 - a_c / c))
    tau = ssa.temperature(
        {"query_alpha": jnp.array([alpha])},
        "query",
        jnp.zeros((1, 1, 2)),
        jnp.array([[n]]),
    )
    found = _mass(float(tau[0, 0, 0]), c, n)
    self.assertAlmostEqual(found, limit, delta=_TOLERANCE)
    self.assertLess(_mass(1.0, c, n), _TOLERANCE)


class SsaTest(parameterized.TestCase):

  def _attn(self, entry, **changes):
    config = configs.TransformerConfig(
        num_layers=1,
        embed_dim=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        attention=(entry,),
        **changes,
    )
    module = attention.Attention(config, 0, implementation="reference")
    x = draws.normal(3, 2, 7, 16)
    positions = jnp.broadcast_to(jnp.arange(7)[None], (2, 7))
    arguments = (x, positions, masks.causal(7))
    params = module.init(jax.random.key(0), *arguments)["params"]
    _, seen = module.apply(
        {"params": params}, *arguments, mutable="intermediates"
    )
    return params, {k: v[0] for k, v in seen["intermediates"].items()}, x

  @parameterized.parameters(None, 3)
  @pytest.mark.slow
  def test_logits_and_values_are_scaled(self, window):
    changes = {} if window is None else {"windows": (window,)}
    params, seen, x = self._attn("ssa:start=0.3", **changes)
    plain = {**params, "ssa": None}
    own = {k: np.asarray(v) for k, v in params["ssa"].items()}
    n = np.minimum(np.arange(1, 8), window or 7)
    gelu = lambda y: np.asarray(jax.nn.gelu(y))

    def tau(of):
      inner = gelu(np.asarray(x) @ own[f"{of}_in"])
      alpha = 1 / (1 + np.exp(-own[f"{of}_alpha"]))
      log_n = np.log(n)[None, :, None] * alpha
      return np.tanh(inner @ own[f"{of}_out"]) + 1 + log_n

    query = np.einsum("BTD,DNH->BTNH", x, plain["query"]["kernel"])
    turned = np.einsum("BTNH,BTN->BTNH", query, tau("query"))
    self.assertGreater(np.abs(turned - query).max(), 0.1)
    value = np.einsum("BTD,DNH->BTNH", x, plain["value"]["kernel"])
    value = np.einsum("BTNH,BTN->BTNH", value, tau("value"))
    want = np.einsum(
        "BNTS,BSNH->BTNH", seen["attn_weights"], np.repeat(value, 2, axis=2)
    )
    np.testing.assert_allclose(seen["head_out"], want, atol=1e-5)
    # The first token sees itself alone: its tau has no logarithm.
    _, cold, _ = self._attn("ssa:width=0:start=-1e9", **changes)
    ratio = seen["attn_logits"] / cold["attn_logits"]
    want = tau("query").swapaxes(1, 2)
    diagonal = np.diagonal(np.asarray(ratio), axis1=2, axis2=3)
    np.testing.assert_allclose(diagonal, want, rtol=1e-3)


if __name__ == "__main__":
  absltest.main()
