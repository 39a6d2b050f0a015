import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import kv_cache
from joma.systems.cache_policies import names
from joma.systems.cache_policies.by_attention import h2o
from joma.systems.cache_policies.wrapping import dms
from scansnap_jax.experiment import errors
from tests.joma.systems.cache_policies import plain
from tests.joma.systems.cache_policies.by_attention import h2o_test
from tests.laws import policy_laws


class Plain(h2o_test.Plain):
  """H2O, whose tokens below the threshold leave at once."""

  num_freed = 0

  def __init__(self, policy, *sizes):
    super().__init__(policy.base, *sizes)
    self.threshold = policy.threshold

  def read(self, query, key, value):
    super().read(query, key, value)
    self._free(len(query))

  def step(self, query, key, value, position):
    self._free(position)
    return super().step(query, key, value, position)

  def _free(self, position):
    for head, slots in enumerate(self.slots):
      kept = [i for i, slot in enumerate(slots) if slot is not None]
      ranks = self.ranks([slots[i] for i in kept], position, head)
      for i, rank in zip(kept, ranks, strict=True):
        if rank < self.threshold:
          slots[i] = None
          type(self).num_freed += 1


def _policy(threshold, **fields):
  return dms.DMS(base=h2o.H2O(num_recent=3, **fields), threshold=threshold)


class DMSTest(parameterized.TestCase):

  def test_keeps_what_plain_python_keeps_at_every_step(self):
    rule = type("Rule", (Plain,), {})
    plain.check(rule, _policy(0.6, num_sinks=1), num_steps=8)
    self.assertGreater(rule.num_freed, 10)

  @parameterized.product(threshold=(0.2, 1.5), heads=((4, 1), (4, 2), (3, 3)))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, threshold, heads):
    plain.check(Plain, _policy(threshold), *heads, num_steps=512, capacity=40)

  @pytest.mark.slow
  def test_slots_that_no_head_needs_are_given_back(self):
    policy = _policy(0.7)
    cache = policy_laws.read(policy, policy_laws.ALL).cache
    position = jnp.array([n + policy_laws.STEPS for n in policy_laws.LENGTHS])
    (small,) = dms.without_unused([cache], position, num_free=2)
    most = int((np.asarray(cache.pos) >= 0).sum(-1).max())
    self.assertEqual(small.capacity, most + 2)
    self.assertLess(small.capacity, policy_laws.ALL)
    kept = lambda c: [
        sorted(p for p in head if p >= 0)
        for head in np.asarray(c.pos).reshape(-1, c.capacity).tolist()
    ]
    self.assertEqual(kept(small), kept(cache))
    self.assertIsInstance(small, kv_cache.SlotCache)

  def test_a_flag_sets_the_threshold(self):
    found = names.parse("dms:threshold=1:h2o:score=mean")
    self.assertEqual(found, dms.DMS(base=h2o.H2O(score="mean"), threshold=1.0))
    with self.assertRaisesRegex(errors.UserError, "'dms' has no 'least'"):
      names.parse("dms:least=1:h2o")
    with self.assertRaisesRegex(errors.UserError, "threshold=nan"):
      dataclasses.replace(found, threshold=float("nan"))


if __name__ == "__main__":
  absltest.main()
