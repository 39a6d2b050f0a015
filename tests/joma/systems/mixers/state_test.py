"""Mixers with a state: a step is one program, however long the text is."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import pytest

from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import model as models
from tests.joma.transformer import applied

_NAMES = (
    "lightning",
    "gdn",
    "kda",
    "gated_conv",
    "grid_conv:rows=4:columns=4",
    "self_gating",
    "titans",
)


def _program(entry, length):
  """A decode step of a text that may become so long, lowered."""
  config = configs.TransformerConfig(
      vocab_size=17,
      num_layers=1,
      embed_dim=16,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      hidden_dim=16,
      max_len=1 << 20,
      attention=(entry,) if entry else (),
  )
  model = models.Transformer(config, implementation="xla")
  params = applied.params(model)
  caches = full_cache.init(config, 2, length)
  one = jax.ShapeDtypeStruct((2, 1), jnp.int32)
  step = jax.jit(
      lambda params, tokens, positions, caches: model.apply(
          {"params": params}, tokens, positions=positions, kv_cache=caches
      ),
      donate_argnums=3,
  )
  return step.lower(params, one, one, caches).as_text()


class StateTest(parameterized.TestCase):

  @parameterized.parameters(*_NAMES)
  @pytest.mark.by_default(0)
  def test_a_step_is_the_same_program_at_1k_and_at_1m(self, entry):
    short = _program(entry, 1 << 10)
    self.assertEqual(short, _program(entry, 1 << 20))
    self.assertIn("tf.aliasing_output", short)  # Its state is donated.

  @pytest.mark.slow
  def test_a_step_of_softmax_is_not(self):
    self.assertNotEqual(_program("", 1 << 10), _program("", 1 << 11))


if __name__ == "__main__":
  absltest.main()
