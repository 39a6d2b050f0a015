"""The op itself is tested in kernels_pallas; here, how it is used."""

import functools

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import attention
from joma.transformer import config as configs
from kernels_pallas import masks
from tests import draws

# Ten times the largest float32 error seen.
_TOLERANCE = 5e-6
_SHAPE = dict(embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8)


@functools.partial(jax.jit, static_argnames=("config", "is_training"))
def _apply(config, x, params=None, **options):
  # Plain attention: a program to compile less.
  module = attention.Attention(config, layer=0, implementation="reference")
  positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
  mask = masks.causal(x.shape[1], x.shape[1])
  if params is None:
    params = module.init(jax.random.key(1), x, positions, mask)["params"]
  (out, _, _), sown = module.apply(
      {"params": params},
      x,
      positions,
      mask,
      mutable="intermediates",
      **options,
  )
  sown = {name: value for name, (value,) in sown["intermediates"].items()}
  return out, sown, params


class AttentionTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.x = draws.normal(0, 2, 6, 16)

  @parameterized.parameters(
      dict(),
      dict(num_layers=1, windows=(3,)),
      dict(attn_logits_soft_cap=0.5, attn_scale=2.0),
      dict(use_qk_norm=True, positions="none"),
  )
  @pytest.mark.by_default(0)
  def test_what_is_sown_gives_the_output(self, **changes):
    config = configs.TransformerConfig(**_SHAPE | changes)
    out, sown, params = _apply(config, self.x)
    value = jnp.einsum("BSD,DKH->BSKH", self.x, params["value"]["kernel"])
    value = jnp.repeat(value, 2, axis=2)  # Head n reads key head n // 2.
    head_out = jnp.einsum("BNTS,BSNH->BTNH", sown["attn_weights"], value)
    chex.assert_trees_all_close(sown["head_out"], head_out, atol=_TOLERANCE)
    want = jnp.einsum("BTNH,NHD->BTD", head_out, params["out"]["kernel"])
    chex.assert_trees_all_close(out, want, atol=2 * _TOLERANCE)

  def test_logits_are_scaled_products_of_rotated_heads(self):
    config = configs.TransformerConfig(**_SHAPE, positions="none")
    _, sown, params = _apply(config, self.x)
    project = lambda name: np.einsum(
        "BTD,DNH->BTNH", self.x, params[name]["kernel"]
    )
    key = np.repeat(project("key"), 2, axis=2)
    logits = np.einsum("BTNH,BSNH->BNTS", project("query"), key) / np.sqrt(8)
    seen = np.tril(np.ones((6, 6), bool))
    want = np.where(seen, logits, -np.inf)
    np.testing.assert_allclose(sown["attn_logits"], want, atol=_TOLERANCE)

  def test_a_window_leaves_the_last_keys(self):
    config = configs.TransformerConfig(**_SHAPE, num_layers=1, windows=(2,))
    _, sown, _ = _apply(config, self.x)
    seen = np.eye(6) + np.eye(6, k=-1)
    np.testing.assert_array_equal(sown["attn_weights"][1, 3] > 0, seen > 0)

  def test_soft_cap_bounds_the_logits(self):
    config = configs.TransformerConfig(**_SHAPE, attn_logits_soft_cap=0.1)
    _, sown, _ = _apply(config, 100 * self.x)
    finite = jnp.where(
        jnp.isfinite(sown["attn_logits"]), sown["attn_logits"], 0
    )
    self.assertBetween(float(jnp.abs(finite).max()), 0.09, 0.1 + 1e-6)

  @pytest.mark.slow
  def test_dropped_weights_keep_their_mean(self):
    config = configs.TransformerConfig(**_SHAPE, attn_dropout=0.5)
    plain, _, params = _apply(config, self.x)
    drop = jax.jit(
        lambda key: _apply(
            config,
            self.x,
            params,
            is_training=True,
            rngs={"dropout": key},
        )[0]
    )
    many = jax.lax.map(drop, jax.random.split(jax.random.key(2), 2000))
    self.assertGreater(float(jnp.abs(many[0] - plain).max()), 0.1)
    # Five standard errors of the mean, of the worst entry.
    error = 5 * (many.std(axis=0) / 2000**0.5).max()
    chex.assert_trees_all_close(many.mean(axis=0), plain, atol=float(error))
