"""Flux: forced routes, where the router starts, and prices of the target."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from joma.systems.routers import flux
from joma.systems.routers import flux_router
from joma.transformer import full_cache
from kernels_pallas import masks
from scansnap_jax.experiment import errors
from tests import draws
from tests.joma.systems import one_layer

_SMALL = "flux:sinks=1:window=3:pool=2:hidden=4"


class FluxTest(parameterized.TestCase):

  def test_forced_routes_are_dense_and_the_streams_mask(self):
    _, params, x = one_layer.draw("")
    run = lambda entry, mask=None: one_layer.head_out(
        dataclasses.replace(one_layer.CONFIG, attention=entry),
        params,
        x,
        mask=mask,
    )
    full = run((f"{_SMALL}:force=full",))
    np.testing.assert_array_equal(full, run(()))
    sparse = run((f"{_SMALL}:force=sparse",))
    stream = masks.streaming(9, window=3, num_sinks=1)
    np.testing.assert_allclose(sparse, run((), stream), atol=1e-6)
    self.assertGreater(np.abs(full - sparse).max(), 0.1)

  @pytest.mark.slow
  def test_the_router_starts_at_full(self):
    config, params, x = one_layer.draw(_SMALL)
    system, own = flux.Flux(pool=2, hidden=4), params["flux"]
    query = draws.normal(1, 2, 9, 4, 8)
    probs = system.full_prob(own, query, jnp.tile(jnp.arange(9)[None], (2, 1)))
    np.testing.assert_allclose(probs, 1 / (1 + np.exp(-4.5)), atol=1e-6)
    self.assertAlmostEqual(float(probs[0]), 0.989, places=3)
    plain = one_layer.head_out(one_layer.CONFIG, params, x)
    got = one_layer.head_out(config, params, x)
    np.testing.assert_allclose(got, plain, atol=1e-6)

  @pytest.mark.slow
  def test_the_pool_is_of_both_ends_and_of_no_padding(self):
    system = flux.Flux(pool=2, hidden=4)
    own = system.init_params(jax.random.key(0), one_layer.CONFIG, 0)
    own["out"] = draws.normal(2, 4, 2)
    query = draws.normal(1, 1, 9, 4, 8)
    at = jnp.arange(9)[None]
    prob = jax.jit(lambda query, at: system.full_prob(own, query, at)[0])
    base = prob(query, jnp.where(at < 7, at, -1))
    for place in range(9):
      moved = prob(query.at[:, place].add(1.0), jnp.where(at < 7, at, -1))
      is_read = place in (0, 1, 5, 6)
      self.assertEqual(abs(float(moved - base)) > 1e-6, is_read, place)

  @parameterized.parameters(0.0, 1.0)
  @pytest.mark.slow
  def test_a_target_is_reached_as_the_price_rises(self, target):
    """By descent of one objective, in which the multipliers ascend."""
    system = flux.Flux(pool=2, hidden=4, target=target, cost=0.1)
    own = system.init_params(jax.random.key(0), one_layer.CONFIG, 0)
    if not target:  # Begins on the other side.
      own["bias"] = own["bias"][::-1]
    query = draws.normal(1, 8, 9, 4, 8)
    at = jnp.tile(jnp.arange(9)[None], (8, 1))

    def price(own):
      sparse = 1 - system.full_share(own, query, at).mean()
      return flux_router.price(own["multipliers"], sparse, target)

    rule = optax.adam(0.05)

    def step(carry, _):
      own, state = carry
      updates, state = rule.update(jax.grad(price)(own), state)
      own = optax.apply_updates(own, updates)
      share = system.full_share(own, query, at).mean()
      return (own, state), (share, own["multipliers"][0])

    run = jax.jit(
        lambda own: jax.lax.scan(step, (own, rule.init(own)), length=200)[1]
    )
    share, first = map(np.asarray, run(own))
    # The route of a text is hard: one whose p is near a half goes to and fro.
    apart = np.abs(share[-80:] - (1 - target))
    self.assertEqual(apart.min(), 0)
    self.assertLessEqual(apart.max(), 1 / 8)
    self.assertGreater(first[-1], system.cost)

  @pytest.mark.slow
  def test_a_prompts_route_holds_for_what_follows(self):
    config, params, x = one_layer.draw(_SMALL)
    own = dict(params["flux"], bias=jnp.array([4.5, 0.0]))
    params = params | {"flux": own}
    got = one_layer.in_steps(config, params, x, 5)
    stream = masks.streaming(9, window=3, num_sinks=1)
    plain = dataclasses.replace(config, attention=())
    want, _ = one_layer.run(plain, params, x, mask=stream)
    np.testing.assert_allclose(got, want, atol=1e-5)
    self.assertEqual(full_cache.init(config, 2, 9)[0].share.shape, (2,))

  def test_what_the_router_costs_does_not_grow_with_the_text(self):
    system = flux.Flux(pool=2, hidden=4)
    own = system.init_params(jax.random.key(0), one_layer.CONFIG, 0)

    def flops(length):
      query = jax.ShapeDtypeStruct((1, length, 4, 8), jnp.float32)
      at = jax.ShapeDtypeStruct((1, length), jnp.int32)
      run = jax.jit(lambda query, at: system.full_prob(own, query, at))
      return run.lower(query, at).compile().cost_analysis()["flops"]

    # A sum of positions is all that is longer.
    self.assertLess(flops(4096) - flops(64), 3 * 4096)

  @parameterized.parameters(
      ("flux:target=2", "target=2.0 must lie in"),
      ("flux:force=dense", "force='dense' must be one of"),
      ("flux:window=0", "window must be at least 1"),
  )
  def test_says_what_would_be_right(self, entry, message):
    with self.assertRaisesRegex(errors.UserError, message):
      one_layer.draw(entry)


if __name__ == "__main__":
  absltest.main()
