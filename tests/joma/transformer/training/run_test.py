"""What a run of `train_lm` refuses before it starts."""

from absl.testing import absltest
from absl.testing import parameterized

from joma.transformer import config as configs
from joma.transformer.training import lm_config
from joma.transformer.training import run
from scansnap_jax.experiment import errors


def _config(**model):
  return lm_config.LmConfig(model=configs.TransformerConfig(**model))


class CheckTest(parameterized.TestCase):

  @parameterized.parameters(
      (("key_bias",), "key_bias"), (("softmax", "lightning"), "lightning")
  )
  def test_what_hugging_face_cannot_say_names_what_can(self, entries, named):
    config = _config(attention=entries)
    message = f"--save_hf: .*cannot say attention=.*{named}.*model_type=joma.*"
    with self.assertRaisesRegex(errors.UserError, message + "--save_own"):
      run.check(config, None, True)
    run.check(config, None, False)
    run.check(_config(), None, True)

  @parameterized.parameters(
      ("ssa:scale=1", "ssa has no option 'scale'; its options: start, width"),
      ("moba:k=few", "k must be like 4, got 'few'"),
      ("moba:k=0", "k=0 and block=128 must not be below 1"),
      ("key_bias+sink_logits", "a layer has one at most"),
      ("lightning+moba", "leaves nothing to moba"),
      ("hip", "hip lets later tokens change"),
  )
  def test_entries_that_cannot_be_trained(self, entry, message):
    with self.assertRaisesRegex(errors.UserError, message):
      run.check(_config(attention=(entry,)), None, False)


if __name__ == "__main__":
  absltest.main()
