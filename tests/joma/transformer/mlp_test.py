import math

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import config as configs
from joma.transformer import mlp
from tests import draws

# Ten times the largest float32 error seen.
_TOLERANCE = 2e-5


def _erf(x):
  return np.vectorize(math.erf)(x)


_NUMPY = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2))),
    "gelu_tanh": (
        lambda x: 0.5
        * x
        * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    ),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "identity": lambda x: x,
    "quadratic": lambda x: x**2,
}


class MlpTest(parameterized.TestCase):

  @parameterized.product(
      activation=tuple(_NUMPY), gated=(False, True), bias=(False, True)
  )
  @pytest.mark.by_default(0, 3)
  def test_equals_numpy(self, activation, gated, bias):
    config = configs.TransformerConfig(
        embed_dim=8,
        hidden_dim=12,
        activation=activation,
        use_gated_mlp=gated,
        use_mlp_bias=bias,
    )
    module = mlp.Mlp(config)
    x = draws.normal(0, 2, 3, 8)
    params = module.init(jax.random.key(1), x)["params"]
    params = jax.tree.map(lambda p: p + 0.1, params)  # Biases start at 0.
    apply = lambda name, x: x @ np.float64(params[name]["kernel"]) + (
        np.float64(params[name]["bias"]) if bias else 0
    )
    hidden = apply("gate" if gated else "up", np.float64(x))
    hidden = _NUMPY[activation](hidden)
    hidden = hidden * apply("up", np.float64(x)) if gated else hidden
    got, sown = module.apply({"params": params}, x, mutable="intermediates")
    np.testing.assert_allclose(got, apply("down", hidden), atol=_TOLERANCE)
    (sown_hidden,) = sown["intermediates"]["hidden"]
    np.testing.assert_allclose(sown_hidden, hidden, atol=_TOLERANCE)

  @pytest.mark.slow
  def test_residual_scale_shrinks_what_enters_the_stream(self):
    shrunk, plain = (
        configs.TransformerConfig(num_layers=8, residual_scale=shrinks)
        for shrinks in (True, False)
    )
    x = jnp.zeros((1, 1, 128))
    down = lambda config: mlp.Mlp(config).init(jax.random.key(0), x)["params"][
        "down"
    ]["kernel"]
    np.testing.assert_allclose(4 * down(shrunk), down(plain), rtol=1e-6)
