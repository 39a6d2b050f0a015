import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.cost import cache_plan
from joma.inference.cost import cost_model
from joma.systems.cache_policies import names
from joma.systems.cache_policies.by_attention import h2o
from joma.systems.cache_policies.own_cache import coded_slots
from scansnap_jax.experiment import errors
from tests.joma.systems.cache_policies import plain
from tests.joma.systems.cache_policies.by_attention import h2o_test
from tests.joma.systems.cache_policies.own_cache import int4_test
from tests.joma.systems.cache_policies.own_cache import kivi_test
from tests.laws import policy_laws


class Plain(h2o_test.Plain):
  """H2O, whose tokens are coded R at a time."""

  num_again = 0

  def __init__(self, policy, *sizes):
    super().__init__(policy.base, *sizes)
    self.num_exact, self.size = policy.num_exact, policy.group_size
    self.exact = [[] for _ in self.heads]

  def read(self, query, key, value):
    super().read(query, key, value)
    for head, slots in enumerate(self.slots):
      count = sum(token is not None for token in slots)
      last = count // self.num_exact * self.num_exact
      self._code(head, range(last))
      self.exact[head] = [*range(last, count)]

  def step(self, query, key, value, position):
    out = super().step(query, key, value, position)
    for head, slots in enumerate(self.slots):
      exact = self.exact[head]
      (slot,) = (
          i
          for i, token in enumerate(slots)
          if token and token["pos"] == position
      )
      if slot in exact:
        type(self).num_again += 1
      else:
        exact.append(slot)
      if len(exact) == self.num_exact:
        self._code(head, exact)
        self.exact[head] = []
    return out

  def _code(self, head, coded):
    slots = self.slots[head]
    for group in {slot // self.size for slot in coded}:
      first = group * self.size
      kept = [t for t in slots[first : first + self.size] if t is not None]
      keys = np.array([token["key"] for token in kept])
      keys = int4_test.plain(keys, "tokens", len(keys))[1]
      for token, key in zip(kept, keys, strict=True):
        token["key"] = key
    for slot in coded:
      value = slots[slot]["value"][None]
      slots[slot]["value"] = int4_test.plain(value, "channels", self.size)[1][0]


def _policy(num_exact=4, group_size=4, **fields):
  fields = {"num_recent": 1, **fields}
  return coded_slots.CodedSlots(
      base=h2o.H2O(**fields), num_exact=num_exact, group_size=group_size
  )


class CodedSlotsTest(parameterized.TestCase):

  def test_is_plain_python_at_every_step(self):
    """Slots that do not fill their last group, with keys far from 0."""
    policy = _policy(num_sinks=1, num_recent=5)
    self._check(policy, num_steps=12, capacity=10, shift=4.0)

  @parameterized.product(sizes=((4, 2), (8, 4)), heads=((4, 1), (4, 2), (3, 3)))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, sizes, heads):
    rule = self._check(_policy(*sizes), *heads, num_steps=512, capacity=40)
    # Tokens have left before they were coded.
    self.assertGreater(rule.num_again, 0)

  def _check(self, policy, *heads, **sizes):
    rule = type("Rule", (Plain,), {})
    init_layer = coded_slots.init_layer
    plain.check(rule, policy, *heads, init_layer=init_layer, **sizes)
    return rule

  @pytest.mark.slow
  def test_holds_the_laws_where_tokens_are_coded(self):
    laws = [*policy_laws.LAWS]
    laws.remove(policy_laws.full_capacity_is_full_attention)
    for law in laws:
      with self.subTest(law.__name__):
        law(_policy(2, 2))

  @parameterized.product(capacity=(100, 256), dtype=("float32", "bfloat16"))
  def test_bytes_are_those_of_the_cost_model(self, capacity, dtype):
    """Of the default sizes and heads of 64, to the byte."""
    config = dataclasses.replace(kivi_test._CONFIG, head_dim=64, num_layers=2)
    policy = names.parse("four_bits:h2o")
    caches = jax.eval_shape(
        lambda: kv_cache.init(policy, config, 3, capacity, jnp.dtype(dtype))
    )
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))
    load = cost_model.Load(batch_size=3, length=1024, cache_dtype=dtype)
    plan = calls.plan(policy, (capacity,) * 2, "x")
    self.assertEqual(cost_model.cache_bytes(config, load, plan), held)

  def test_bytes_by_hand(self):
    """100 slots, H = 64, bfloat16: four groups of 32, and 32 exact ones."""
    coding = cache_plan.CodedSlots(32, 32)
    codes, scales = 128 * 64, 2 * 2 * (4 * 64 + 128 * 2)
    exact = 32 * (2 * 64 * 2 + 4)
    self.assertEqual(coding.bytes_of(100, 64, 2), codes + scales + exact)

  @parameterized.parameters(
      (
          "four_bits:num_exact=10:group_size=4:h2o",
          "num_exact=10 must be a multiple",
      ),
      ("four_bits:group_size=0:h2o", "group_size"),
      ("four_bits:kivi", "four_bits:kivi: kivi keeps tokens in its own way"),
      ("four_bits:full", "or kivi for all tokens"),
      ("four_bits:cam:h2o", "four_bits:cam: cam changes values"),
  )
  def test_what_cannot_be_is_named(self, name, message):
    with self.assertRaisesRegex(errors.UserError, message):
      names.parse(name)

  def test_what_it_cannot_hold_is_named(self):
    for options, message in (
        ({"dtype": jnp.int8}, "dtype=int8 of a four_bits"),
        ({"page_size": 2}, "four_bits keeps rotated keys"),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        kv_cache.init(_policy(), kivi_test._CONFIG, 1, 8, **options)


if __name__ == "__main__":
  absltest.main()
