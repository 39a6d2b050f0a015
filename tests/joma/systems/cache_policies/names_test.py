from absl.testing import absltest
from absl.testing import parameterized

from joma.systems.cache_policies import names as policy_names
from joma.systems.cache_policies.by_attention import h2o
from joma.systems.cache_policies.own_cache import ada_kv
from joma.systems.cache_policies.own_cache import quest
from scansnap_jax.experiment import errors


class FromNameTest(absltest.TestCase):

  def test_makes_each_with_its_fields(self):
    for name, kind in policy_names.all_policies().items():
      self.assertIsInstance(policy_names.from_name(name), kind)
    self.assertEqual(
        policy_names.from_name("h2o", score="mean"), h2o.H2O(score="mean")
    )

  def test_unknown_names_and_fields_are_named_with_the_known(self):
    with self.assertRaisesRegex(errors.UserError, "'h20' is unknown.*h2o"):
      policy_names.from_name("h20")
    with self.assertRaisesRegex(errors.UserError, "no 'decoy'.*decay"):
      policy_names.from_name("h2o", decoy=1)

  def test_messages_have_the_name_that_flags_give(self):
    for name in policy_names.POLICIES:
      policy = policy_names.from_name(name)
      self.assertEqual(policy_names.name_of(policy), name)
    message = "adakv:tova: tova has no .* as adakv:h2o"
    with self.assertRaisesRegex(errors.UserError, message):
      policy_names.parse("adakv:tova")


class ParseTest(parameterized.TestCase):

  def test_settings_of_policies(self):
    found = policy_names.parse("h2o:score=ema:decay=0.9")
    self.assertEqual(found, h2o.H2O(score="ema", decay=0.9))
    found = policy_names.parse("streaming_llm:num_sinks=2")
    self.assertEqual(found.num_sinks, 2)
    found = policy_names.parse("pyramidkv:beta=1")
    self.assertIsInstance(found.beta, float)

  @parameterized.parameters(
      ("h3o", "h3o.*h2o"),
      ("h2o:colour=red", "colour"),
      ("h2o:score=worst", "worst"),
      ("h2o:score", "written :name=value"),
      ("h2o:decay=abc", "decay=abc must be a float"),
      ("snapkv:window=1.5", "window=1.5 must be an int"),
      ("h2o:num_sinks=true", "num_sinks=True must be an int"),
      ("adakv:window:num_recent=x", "num_recent=x must be an int or none"),
  )
  def test_policies_that_are_none(self, name, message):
    with self.assertRaisesRegex(errors.UserError, message):
      policy_names.parse(name)

  def test_adakv_shares_out_by_another_and_quest_is_one_of_them(self):
    self.assertEqual(
        policy_names.parse("adakv:h2o:score=mean"),
        ada_kv.AdaKV(base=h2o.H2O(score="mean")),
    )
    self.assertEqual(policy_names.parse("adakv").base, h2o.H2O())
    self.assertEqual(
        policy_names.parse("quest:page_size=8"), quest.Quest(page_size=8)
    )


if __name__ == "__main__":
  absltest.main()
