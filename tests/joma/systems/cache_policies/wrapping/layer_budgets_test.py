from absl.testing import absltest
from absl.testing import parameterized

from joma.inference.cache import kv_cache
from joma.systems.cache_policies import names
from joma.systems.cache_policies.by_attention import h2o
from joma.systems.cache_policies.by_place import window
from joma.systems.cache_policies.wrapping import layer_budgets
from scansnap_jax.experiment import errors
from tests.joma.systems.cache_policies import plain
from tests.joma.systems.cache_policies.by_attention import h2o_test
from tests.laws import policy_laws

LayerBudgets = layer_budgets.LayerBudgets


class LayerBudgetsTest(parameterized.TestCase):

  @parameterized.parameters(
      # Of 4 layers with 13 slots: 3 are protected or new, 40 are shared out.
      ("falling", 4.0, (19, 15, 11, 7)),
      ("rising", 4.0, (7, 11, 15, 19)),
      ("ends", 3.0, (16, 10, 10, 16)),
      ("falling", 1.0, (13, 13, 13, 13)),
  )
  def test_lines_by_hand(self, curve, ratio, wanted):
    base = h2o.H2O(num_sinks=1, num_recent=1)
    policy = LayerBudgets(base=base, curve=curve, ratio=ratio)
    self.assertEqual(policy.capacities(4, 13), wanted)

  def test_shares_of_ones_own(self):
    policy = LayerBudgets(base=window.Window(num_recent=0), shares=(1.0, 3.0))
    self.assertEqual(policy.capacities(2, 9), (5, 13))
    with self.assertRaisesRegex(errors.UserError, "are 2, of a model of 3"):
      policy.capacities(3, 9)

  def test_caches_have_so_many_slots_and_keep_what_the_base_keeps(self):
    policy = names.parse("by_layer:ratio=1:h2o:num_recent=2")
    rule = type(
        "Rule",
        (h2o_test.Plain,),
        {
            "__init__": lambda self, policy, *sizes: h2o_test.Plain.__init__(
                self, policy.base, *sizes
            )
        },
    )
    plain.check(rule, policy, num_steps=4)
    policy = names.parse("by_layer:curve=rising:streaming_llm:num_sinks=1")
    (cache,) = kv_cache.init(policy, policy_laws.CONFIG, 1, 8)
    self.assertEqual(cache.capacity, 8)

  @parameterized.parameters(
      (dict(curve="flat"), "curve=flat"),
      (dict(ratio=0.5), "ratio=0.5"),
      (dict(shares=(1.0, 0.0)), "shares="),
  )
  def test_out_of_range_is_named(self, fields, message):
    with self.assertRaisesRegex(errors.UserError, message):
      LayerBudgets(base=h2o.H2O(), **fields)


if __name__ == "__main__":
  absltest.main()
