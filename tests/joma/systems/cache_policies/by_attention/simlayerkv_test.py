from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.cost import cache_plan
from joma.systems.cache_policies.by_attention import simlayerkv
from joma.transformer import config as configs
from scansnap_jax.experiment import errors
from tests.joma.systems.cache_policies import plain
from tests.laws import policy_laws


class Plain(plain.Plain):
  """Judged once, by all heads together; from then on all or near tokens."""

  verdicts = None

  def __init__(self, policy, *sizes):
    super().__init__(policy, *sizes)
    self.is_lazy = None
    self.size = policy.num_sinks + policy.num_recent + 1

  def score_prompt(self, tokens, seen):
    last = seen.of_all[:, max(seen.length - self.policy.num_queries, 0) :]
    near = [self._is_near(t, seen.length - 1) for t in range(seen.length)]
    if seen.length > self.size and self.is_lazy is None:
      self._judge(last[:, :, near].sum(-1).mean())

  def priorities(self, tokens, position, head):
    return [token["pos"] for token in tokens]

  def read(self, query, key, value):
    super().read(query, key, value)
    self._free(len(query))

  def step(self, query, key, value, position):
    self._free(position)
    return super().step(query, key, value, position)

  def observe_all(self, rows, position):
    if self.is_lazy is None and position + 1 >= 2 * self.size:
      shares = []
      for head, _, weights in rows:
        kept = [s for s in self.slots[head] if s is not None]
        near = [self._is_near(s["pos"], position) for s in kept]
        shares.append(weights[near].sum())
      self._judge(np.mean(shares))

  def _judge(self, share):
    self.is_lazy = bool(share > self.policy.threshold)
    self.verdicts.append(self.is_lazy)

  def _is_near(self, pos, last):
    recent = pos >= last - self.policy.num_recent
    return pos < self.policy.num_sinks or recent

  def _free(self, position):
    for slots in self.slots if self.is_lazy else ():
      for i, slot in enumerate(slots):
        if slot is not None and not self._is_near(slot["pos"], position):
          slots[i] = None


def _check(policy, *heads, **sizes):
  rule = type("Rule", (Plain,), dict(verdicts=[]))
  plain.check(rule, policy, *heads, **sizes)
  return rule.verdicts


def _policy(threshold, num_queries=1):
  return simlayerkv.SimLayerKV(
      num_sinks=1, num_recent=8, threshold=threshold, num_queries=num_queries
  )


class SimLayerKVTest(parameterized.TestCase):

  def test_keeps_what_plain_python_keeps_at_every_step(self):
    """A short text, two longer ones; one is lazy."""
    verdicts = _check(_policy(0.4, 2), num_steps=16, capacity=48)
    self.assertLen(verdicts, 3)
    self.assertEqual(set(verdicts), {True, False})

  @parameterized.product(
      threshold=(0.0, 0.4, 1.0), heads=((4, 1), (4, 2), (3, 3))
  )
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, threshold, heads):
    policy = _policy(threshold, 3)
    verdicts = _check(policy, *heads, num_steps=512, capacity=80)
    self.assertLen(verdicts, 3)
    if threshold in (0, 1):
      self.assertEqual(set(verdicts), {threshold == 0})

  @pytest.mark.slow
  def test_slots_that_nobody_uses_are_given_back(self):
    """And steps go on as if they had stayed."""
    policy, config = _policy(0.0), policy_laws.CONFIG
    caches = kv_cache.init(policy, config, 3, policy_laws.ALL)
    arrays, lengths = policy_laws.draw(), jnp.array([11, 14, 12])
    steps = jnp.arange(14)[None]
    positions = jnp.where(steps < lengths[:, None], steps, -1)
    attend = lambda cache, *args: cache.attend(
        *args, lambda x, positions: x, policy_laws._OPTIONS
    )
    _, cache = attend(caches[0], *(x[:, :14] for x in arrays), positions)
    (small,) = simlayerkv.without_unused([cache], lengths)
    self.assertEqual((cache.capacity, small.capacity), (32, 10))
    for step in range(6):
      at = lengths + step
      pick = lambda x, at=at: jnp.take_along_axis(
          x, at[:, None, None, None], axis=1
      )
      args = (*map(pick, arrays), at[:, None])
      want, cache = attend(cache, *args)
      got, small = attend(small, *args)
      np.testing.assert_allclose(got, want, atol=1e-6)
    keeps_all = kv_cache.init(_policy(1.0), config, 3, policy_laws.ALL)
    same = simlayerkv.without_unused(keeps_all, lengths)
    self.assertEqual(same[0].capacity, policy_laws.ALL)

  @parameterized.parameters(({}, 1028), ({"num_recent": 99, "beta": 2}, 104))
  def test_cost_is_that_of_the_layers_that_keep_all(self, settings, lazy):
    config = configs.TransformerConfig(vocab_size=5, num_layers=4, num_heads=4)
    room = cache_plan.Room(
        kept=0.5, length=4096, model=config, settings=settings
    )
    plan = calls.costed(simlayerkv.SimLayerKV(), room, "x")
    self.assertEqual(plan.capacities, (4096, 4096, lazy, lazy))

  @parameterized.parameters(
      (dict(threshold=1.5), "threshold=1.5"),
      (dict(num_queries=0), "num_queries=0"),
  )
  def test_out_of_range_is_named(self, fields, message):
    with self.assertRaisesRegex(errors.UserError, message):
      simlayerkv.SimLayerKV(**fields)

  def test_sinks_that_leave_no_slot_are_named(self):
    message = "num_sinks=4 leave none of 4"
    with self.assertRaisesRegex(errors.UserError, message):
      calls.fitted(simlayerkv.SimLayerKV(), 4)


if __name__ == "__main__":
  absltest.main()
