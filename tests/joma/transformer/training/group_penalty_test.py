"""The penalty by hand, its pull, and that training adds it."""

from unittest import mock

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import config as configs
from joma.transformer.text import batches
from joma.transformer.training import group_penalty
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step
from scansnap_jax.experiment import errors


def _layer(seed):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: {"kernel": np.float32(rng.normal(size=shape))}
  return {"mlp": {"up": draw(3, 8), "gate": draw(3, 8), "down": draw(8, 3)}}


class GroupPenaltyTest(absltest.TestCase):

  def test_it_is_the_sum_of_the_blocks_norms(self):
    params, want = {"layers_0": _layer(0), "layers_1": _layer(1)}, 0.0
    for layer in params.values():
      mlp = {name: part["kernel"] for name, part in layer["mlp"].items()}
      for u in range(0, 8, 4):
        block = [mlp["up"][:, u : u + 4], mlp["gate"][:, u : u + 4]]
        block.append(mlp["down"][u : u + 4])
        want += np.sqrt(sum((part**2).sum() for part in block))
    found = group_penalty.penalty({**params, "output": {}}, 4)
    np.testing.assert_allclose(found, want, rtol=1e-6)

  @pytest.mark.slow
  def test_it_pulls_every_block_alike_and_leaves_what_is_gone(self):
    """Weight decay, the twin, pulls by size."""
    layer = _layer(0)
    for name, part in layer["mlp"].items():
      first, last = (slice(0, 4), slice(4, 8))
      axis = (lambda s: s) if name == "down" else (lambda s: (slice(None), s))
      part["kernel"][axis(first)] = 0
      part["kernel"][axis(last)] *= 100
    grads = jax.grad(group_penalty.penalty)({"layers_0": layer}, 4)
    pull = group_penalty.block_norms(grads, 4)["layers_0"]
    np.testing.assert_allclose(pull, [0, 1], atol=1e-5)

  def test_training_adds_it_to_the_mean_loss_and_evaluation_does_not(self):
    model = configs.TransformerConfig(
        vocab_size=11,
        num_layers=1,
        embed_dim=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        hidden_dim=8,
    )
    make = lambda factor: lm_step.make_task(
        lm_config.LmConfig(model=model, group_penalty=factor, group_size=4),
        2,
        1,
    )
    plain, task = make(0.0), make(0.5)
    params = {"layers_0": _layer(0)}
    tokens = jnp.zeros((2, 5), jnp.int32)
    batch = batches.Batch(tokens, tokens, jnp.ones((2, 5)))
    # What the model says does not matter here.
    losses = jnp.full((2, 5), np.log(11))
    said = mock.patch.object(
        lm_step, "apply_with_losses", return_value=(losses, jnp.asarray(0.25))
    )
    loss = lambda task, *key: lm_step.loss_sum(params, batch, task, *key) / 10
    with said:
      whole, without = (loss(one, jax.random.key(0)) for one in (task, plain))
      evaluated = loss(task)
    want = 0.5 * group_penalty.penalty(params, 4)
    np.testing.assert_allclose(whole - without, want, rtol=1e-5)
    np.testing.assert_allclose(without, np.log(11) + 0.25, rtol=1e-5)
    np.testing.assert_allclose(evaluated, np.log(11), rtol=1e-5)

  def test_says_what_would_be_right(self):
    with self.assertRaisesRegex(errors.UserError, "group_size=7 must divide"):
      lm_config.LmConfig(group_penalty=0.1, group_size=7)


if __name__ == "__main__":
  absltest.main()
