"""Systems laid over models, and those that are not to be trained."""

from absl.testing import absltest
from absl.testing import parameterized

from joma.transformer import config as configs
from joma.transformer import layer_hooks
from scansnap_jax.experiment import errors


def _config(*attention):
  return configs.TransformerConfig(num_layers=2, attention=attention)


class OverTest(parameterized.TestCase):

  def test_nothing_over_a_model_is_the_model(self):
    config = _config("lightning", "hip")
    self.assertEqual(layer_hooks.over(config, ()), config)

  def test_selectors_go_over_what_has_no_parameters(self):
    pattern = ("softmax", "hip:k=256")
    for config in (_config(), _config("hip")):
      found = layer_hooks.over(config, pattern)
      self.assertEqual(found.attention, pattern)

  @parameterized.parameters(
      ((), ("hip", "sink_logits"), "hip,sink_logits: sink_logits has parameters"
       " of its own, which this model lacks"),
      ((), ("ssa",), "attention=ssa: ssa has parameters of its own"),
      (("lightning",), ("hip",), "lightning has parameters of its own, which"
       " this model has and would not use"),
      ((), ("hipp",), "no system 'hipp'; the nearest is 'hip'"),
      ((), ("hip:key=1",), "hip has no option 'key'"),
      ((), ("hip:k=few",), "k must be like 512, got 'few'"),
      ((), ("hip",) * 4, "4 entries, but the model has 2 layers"),
      ((), ("softmax", "lightning+hip"), "leaves nothing to hip"),
      ((), ("key_bias+sink_logits",), "both are of the kind weights"),
  )  # fmt: skip
  def test_others_are_refused(self, own, over, message):
    with self.assertRaisesRegex(errors.UserError, message):
      layer_hooks.over(_config(*own), over)

  def test_what_sees_later_tokens_is_not_trained(self):
    layer_hooks.check_trainable(_config("lightning", "sink_logits"))
    with self.assertRaisesRegex(errors.UserError, "hip lets later tokens"):
      layer_hooks.check_trainable(_config("softmax", "hip"))
    with self.assertRaisesRegex(errors.UserError, "leaves nothing to hip"):
      layer_hooks.check_trainable(_config("lightning+hip"))


if __name__ == "__main__":
  absltest.main()
