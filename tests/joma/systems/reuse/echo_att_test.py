"""EchoAtt: weights are shared, parameters are left out, distilling helps."""

import functools

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.systems.reuse import distillation
from joma.systems.reuse import echo_att
from joma.systems.reuse import stage_losses
from joma.transformer import config as configs
from joma.transformer import model as models
from tests.joma.transformer import applied

_ENTRY = "echo_att:share=2:first=1:last=1"  # Layer 2 takes of layer 1.


def _model(entry):
  config = configs.TransformerConfig(
      vocab_size=11,
      num_layers=4,
      embed_dim=16,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      hidden_dim=8,
      embed_scale=4.0,
      attention=(entry,) if entry else (),
  )
  return models.Transformer(config, implementation="reference")


@functools.cache
def _drawn(entry):
  return applied.params(_model(entry))


def _shapes(entry):
  """Of parameters; nothing is compiled."""
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  draw = functools.partial(_model(entry).init, jax.random.key(0))
  return jax.eval_shape(draw, tokens)["params"]


def _count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _texts(num, seed=1):
  """Random tokens: the teacher says what comes next."""
  rng = np.random.default_rng(seed)
  for _ in range(num):
    yield jnp.asarray(rng.integers(0, 11, (8, 16)), jnp.int32)


class EchoAttTest(absltest.TestCase):

  def test_which_layers_take(self):
    config = configs.TransformerConfig(num_layers=9)
    system = echo_att.EchoAtt(share=3, first=1, last=2)
    found = [layer for layer in range(9) if system.is_source(config, layer)]
    self.assertEqual(found, [0, 1, 4, 7, 8])

  def test_a_layer_that_takes_has_no_projections_of_queries_and_keys(self):
    shared, plain = _shapes(_ENTRY), _shapes("")
    self.assertEqual(set(shared["layers_2"]["attn"]), {"value", "out"})
    # D H (N + K) of one layer.
    self.assertEqual(_count(plain) - _count(shared), 16 * 8 * (4 + 2))
    student = distillation.student_of(_model(_ENTRY), plain)
    self.assertEqual(student, shared)

  @pytest.mark.slow
  def test_its_weights_are_those_of_its_source(self):
    """To the bit; the twin is the plain model, whose weights are others."""
    tokens = next(_texts(1))
    weights = {}
    for entry in (_ENTRY, ""):
      run = jax.jit(
          functools.partial(_model(entry).apply, mutable="intermediates")
      )
      seen = run({"params": _drawn(entry)}, tokens)[1]["intermediates"]
      weights[entry] = [
          seen[f"layers_{layer}"]["attn"]["attn_weights"][0] for layer in (1, 2)
      ]
    np.testing.assert_array_equal(*weights[_ENTRY])
    self.assertGreater(jnp.abs(weights[""][0] - weights[""][1]).max(), 0.1)

  @pytest.mark.slow
  def test_distilling_brings_the_student_back(self):
    """Judged by texts that it has not seen; the text alone teaches another."""
    teacher, model, params = _model(""), _model(_ENTRY), _drawn("")
    start = distillation.student_of(model, params)
    text, asked = next(_texts(1, seed=9)), (teacher, params)
    run = jax.jit(stage_losses.teacher_loss, static_argnums=(0, 2))
    far = lambda params: float(run(model, params, *asked, text))
    after, _ = distillation.train(model, start, _texts(60), 3e-3, asked)
    self.assertLess(far(after), 0.8 * far(start))
    other, losses = distillation.train(model, after, [text] * 20, 3e-3)
    self.assertLess(losses[-1], losses[0])
    self.assertGreater(far(other), far(after))


if __name__ == "__main__":
  absltest.main()
