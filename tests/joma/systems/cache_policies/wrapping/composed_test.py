from absl.testing import absltest
from absl.testing import parameterized
import pytest

from joma.inference.cache import calls
from joma.inference.cost import cache_plan
from joma.systems.cache_policies import names
from joma.systems.cache_policies.by_attention import h2o
from joma.systems.cache_policies.by_key import knorm
from joma.systems.cache_policies.own_cache import quest
from joma.systems.cache_policies.wrapping import composed
from scansnap_jax.experiment import errors
from tests.joma.systems.cache_policies import plain
from tests.joma.systems.cache_policies.by_attention import h2o_test
from tests.joma.systems.cache_policies.by_key import knorm_test


class Plain(plain.Plain):
  """Short keys first, then attention; scores of the two under two names."""

  def __init__(self, policy, *sizes):
    super().__init__(policy, *sizes)
    self.first = knorm_test.Plain(policy.first, *sizes)
    self.second = h2o_test.Plain(policy.base, *sizes)

  def score_prompt(self, tokens, seen):
    self.first.score_prompt(tokens, seen)
    for token in tokens:
      token["norm"] = token["score"]
    self.second.score_prompt(tokens, seen)

  def enter(self, token, head, position):
    self.first.enter(token, head, position)
    token["norm"], token["score"] = token["score"], 0.0

  def observe(self, kept, rows, position):
    self.second.observe(kept, rows, position)

  def priorities(self, tokens, position, head):
    for token in tokens:
      token["first"] = token["norm"]
    by_norm = self._order(self.first, tokens, position, head, "norm")
    by_mass = self._order(self.second, tokens, position, head, "score")
    num_wide = min(int(self.policy.wide * self.capacity), len(tokens))
    stays = set(by_norm[len(tokens) - num_wide :])
    found = [0] * len(tokens)
    for place, i in enumerate(by_mass):
      found[i] = len(tokens) + place if i in stays else by_norm.index(i)
    return found

  def _order(self, rule, tokens, position, head, name):
    named = [dict(token, score=token[name]) for token in tokens]
    ranks = rule.ranks(named, position, head)
    return sorted(
        range(len(tokens)), key=lambda i: (ranks[i], tokens[i]["pos"])
    )


def _policy(wide=1.5):
  return composed.Composed(
      first=knorm.Knorm(num_recent=2),
      base=h2o.H2O(num_sinks=1, num_recent=3),
      wide=wide,
  )


class ComposedTest(parameterized.TestCase):

  def test_keeps_what_plain_python_keeps_at_every_step(self):
    plain.check(Plain, _policy(), num_steps=8)

  @parameterized.product(wide=(1.0, 1.7), heads=((4, 1), (4, 2), (3, 3)))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, wide, heads):
    plain.check(Plain, _policy(wide), *heads, num_steps=512)

  def test_costs_the_firsts_score_more(self):
    plan, base = (
        calls.plan(_policy(), (8, 8), "x"),
        cache_plan.scored((8, 8), "x"),
    )
    self.assertEqual(plan.slot_state, base.slot_state + 4)
    self.assertEqual(plan.slot_traffic, base.slot_traffic + 8)

  def test_flags_name_two_policies(self):
    found = names.parse("two_stage:wide=3:knorm:num_sinks=1+h2o:score=mean")
    wanted = composed.Composed(
        first=knorm.Knorm(num_sinks=1), base=h2o.H2O(score="mean"), wide=3.0
    )
    self.assertEqual(found, wanted)
    with self.assertRaisesRegex(errors.UserError, "adakv wraps one policy"):
      names.parse("adakv:knorm+h2o")

  @parameterized.parameters(
      (dict(wide=0.5), "wide=0.5"),
      (dict(base=quest.Quest()), "cache of its own"),
      (dict(first=h2o.H2O(score="ema")), "one of them at most"),
  )
  def test_what_cannot_be_composed_is_named(self, fields, message):
    fields = dict(first=knorm.Knorm(), base=h2o.H2O()) | fields
    with self.assertRaisesRegex(errors.UserError, message):
      composed.Composed(**fields)


if __name__ == "__main__":
  absltest.main()
