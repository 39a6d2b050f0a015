"""The terms of distance beside a loop over pairs."""

import functools

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import attention
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer.weighing import rows
from kernels_pallas import masks
from kernels_pallas import selection
from tests import draws


class DistanceBiasTest(absltest.TestCase):

  def _layer(self, length=7):
    config = configs.TransformerConfig(
        num_layers=1, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8,
        positions="none", attention=("distance_bias:reach=4:start=1.0",),
    )  # fmt: skip
    module = attention.Attention(config, 0, implementation="reference")
    x = draws.normal(3, 2, length, 16)
    places = jnp.broadcast_to(jnp.arange(length)[None], (2, length))
    arguments = (x, places, masks.causal(length))
    params = jax.jit(module.init)(jax.random.key(0), *arguments)["params"]
    run = jax.jit(functools.partial(module.apply, mutable="intermediates"))
    return x, params, lambda: run({"params": params}, *arguments)

  def test_logits_are_those_of_the_equation(self):
    x, params, apply = self._layer()
    seen = apply()[1]["intermediates"]
    own = {k: np.asarray(v) for k, v in params["distance_bias"].items()}
    project = lambda name: np.einsum(
        "TD,DNH->TNH", x[1], params[name]["kernel"]
    )
    query, key = project("query"), project("key")
    got = seen["attn_logits"][0][1]
    for head in range(4):
      for t in range(7):
        for s in range(t + 1):
          far = min(t - s, 3)
          q = query[t, head] + own["query"][head]
          want = q @ (key[s, head // 2] + own["keys"][far, head]) * 8**-0.5
          want += own["bias"][far, head]
          np.testing.assert_allclose(got[head, t, s], want, atol=1e-4)
    # The twin counts distances from the other end.
    far = own["bias"][3, 0] - own["bias"][0, 0]
    self.assertGreater(abs(far), 0.1)

  @pytest.mark.slow
  def test_parts_of_the_queries_give_what_all_at_once_do(self):
    """Values and gradients, of masks and of selections of blocks."""
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    query, key, value = (
        draw(0, 2, 300, 4, 8),
        draw(1, 2, 300, 2, 8),
        draw(2, 2, 300, 2, 8),
    )
    _, params, _ = self._layer()
    table = params["distance_bias"]["bias"]
    rule = hooks.WeightRule(
        name="bias",
        bias=lambda query, places, others: table[
            jnp.clip(places[:, :, None] - others[:, None], 0, 3)
        ].transpose(0, 3, 1, 2),
    )
    options = hooks.AttentionOptions(scale=0.3, weights=rule)
    places = jnp.broadcast_to(jnp.arange(300)[None], (2, 300))
    mask = masks.causal(300)
    blocks = selection.from_mask(mask, 300, 300, block_q=16, block_kv=16)
    run = jax.jit(
        lambda attend, where, *arrays: jax.value_and_grad(
            lambda *arrays: (
                attend(*arrays, where, options, (places, places)) ** 2
            ).sum(),
            argnums=(0, 1, 2),
        )(*arrays),
        static_argnums=0,
    )
    for where in (mask, blocks):
      got = run(rows.attend, where, query, key, value)
      want = run(rows.attend_at_once, where, query, key, value)
      for one, two in zip(
          jax.tree.leaves(got), jax.tree.leaves(want), strict=True
      ):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
  absltest.main()
