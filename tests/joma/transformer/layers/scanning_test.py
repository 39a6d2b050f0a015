import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import model as models
from joma.transformer import sharding
from joma.transformer.hf import pretrained
from joma.transformer.layers import scanning
from joma.transformer.training import init
from joma.transformer.training import lm_config
from joma.transformer.training import lm_probes
from joma.transformer.training import lm_step
from scansnap_jax.experiment import errors
from tests.joma.transformer.training.made import tiny_task

_ONE_BY_ONE = dataclasses.replace(
    tiny_task.CONFIG.model, num_layers=3, tie_embeddings=True
)
_SCANNED = dataclasses.replace(_ONE_BY_ONE, scan_layers=True)
# Sums of some ten numbers in another order.
_TOLERANCE = 2e-6


def _task(model, **changes):
  changes = dict(optimizer="adamw", lr=1e-2) | changes
  return tiny_task.make_task(model=model, **changes)


class TreesTest(absltest.TestCase):

  def test_layers_are_put_together_in_their_order_and_taken_apart(self):
    tree = {f"layers_{n}": {"w": np.full(2, n)} for n in (10, 2, 0, 1)}
    tree |= {f"layers_{n}": {"w": np.full(2, n)} for n in range(3, 10)}
    tree["norm"] = np.ones(3)
    stacked = scanning.stack((tree, [1]))
    self.assertEqual(set(stacked[0]), {"layers", "norm"})
    np.testing.assert_array_equal(
        stacked[0]["layers"]["w"], np.arange(11)[:, None].repeat(2, 1)
    )
    self.assertIsInstance(stacked[0]["layers"]["w"], np.ndarray)
    chex.assert_trees_all_equal(scanning.unstack(stacked), (tree, [1]))

  @pytest.mark.slow
  def test_a_state_of_training_is_of_either_layout(self):
    one_by_one, scanned = (_task(m) for m in (_ONE_BY_ONE, _SCANNED))
    ours, theirs = (
        jax.jit(lm_step.init, static_argnames="task")(task=t)
        for t in (one_by_one, scanned)
    )
    # The same numbers from the same seed.
    chex.assert_trees_all_equal(scanning.stack(ours), theirs)
    chex.assert_trees_all_equal(scanning.unstack(theirs), ours)
    self.assertEqual(type(theirs.opt_state), type(ours.opt_state))

  def test_axes_of_a_stack_are_those_of_a_layer(self):
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 1), sharding.AXES)
    P = jax.sharding.PartitionSpec  # pylint: disable=invalid-name
    for path, shape, axes in (
        ("attn/query/kernel", (3, 8, 2, 4), (None, "fsdp", "tensor", None)),
        ("mlp/down/kernel", (3, 12, 8), (None, "tensor", "fsdp")),
        ("attn_norm/scale", (3, 8), (None,)),
    ):
      spec = sharding.partition_spec(f"params/layers/{path}", shape, mesh)
      self.assertEqual(spec, P(*axes), path)


class RefusalTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(windows=(4, 0, 4)), "windows=4,0,4"),
      (dict(attention=("sink_logits",)), "attention=sink_logits"),
  )
  def test_layers_that_differ_are_refused_with_the_reason(self, changes, why):
    with self.assertRaisesRegex(errors.UserError, f"one program .*{why}"):
      dataclasses.replace(_SCANNED, **changes)

  def test_alike_windows_are_alike(self):
    same = dataclasses.replace(_SCANNED, windows=(4, 4, 4))
    self.assertTrue(same.scan_layers)

  def test_a_cache_wants_layers_one_by_one(self):
    model = models.Transformer(_SCANNED, implementation="reference")
    with self.assertRaisesRegex(errors.UserError, "caches and routers"):
      jax.eval_shape(
          lambda: model.init(
              jax.random.key(0), jnp.zeros((1, 2), int), kv_cache=(1, 1, 1)
          )
      )


class SameModelTest(parameterized.TestCase):

  @parameterized.parameters("full", "none", "dots", "offload")
  @pytest.mark.slow
  def test_losses_are_those_of_layers_one_by_one(self, remat):
    batches = tiny_task.draw_batches(3)
    plain = _task(_ONE_BY_ONE)
    state, losses = tiny_task.train(plain_state(plain), batches, task=plain)
    task = _task(_SCANNED, remat=remat)
    ours, found = tiny_task.train(plain_state(task), batches, task=task)
    np.testing.assert_allclose(found, losses, rtol=_TOLERANCE)
    # Three steps of Adam divide by the size of gradients.
    chex.assert_trees_all_close(
        scanning.unstack(ours.params), state.params, atol=1e-4
    )

  @pytest.mark.slow
  def test_gradients_with_groups_are_those_of_layers_one_by_one(self):
    found = []
    for model in (_ONE_BY_ONE, _SCANNED):
      task = _task(model, group_penalty=0.1, group_size=4)
      batch = jax.tree.map(lambda x: x[0], tiny_task.draw_batches(1))
      grad = jax.jit(jax.grad(lm_step.loss_sum), static_argnames="task")
      params = init.init_params(task.config, task.model)
      grads = grad(params, batch, task=task, dropout_key=jax.random.key(0))
      found.append(scanning.unstack(grads))
    chex.assert_trees_all_close(found[1], found[0], atol=1e-4, rtol=1e-4)

  @pytest.mark.slow
  def test_probes_see_every_layer(self):
    batches = tiny_task.draw_batches(2)
    found = []
    for model in (_ONE_BY_ONE, _SCANNED):
      task = _task(model)
      params = init.init_params(task.config, task.model)
      found.append(lm_probes.probe(params, batches, task=task))
    self.assertEqual(found[0].entropy.shape, (3,))
    chex.assert_trees_all_close(found[1], found[0], rtol=1e-5)

  def test_a_folder_has_layers_one_by_one(self):
    task = _task(_SCANNED)
    params = init.init_params(task.config, task.model)
    folder = self.create_tempdir().full_path
    pretrained.save(folder, _SCANNED, params)
    config, loaded = pretrained.load(folder)
    self.assertFalse(config.scan_layers)
    self.assertIn("layers_2", loaded)
    chex.assert_trees_all_equal(scanning.stack(loaded), params)


class OneProgramTest(absltest.TestCase):

  def test_a_program_does_not_grow_with_layers(self):
    def length(num_layers):
      config = dataclasses.replace(_SCANNED, num_layers=num_layers)
      task = _task(config)
      state = jax.eval_shape(lambda: lm_step.init(task))
      batch = tiny_task.draw_batches(1)
      step = jax.jit(lambda s, b: lm_step.train(s, b, task=task))
      return len(step.lower(state, batch).as_text().splitlines())

    # Initial values are drawn beside: numbers alone differ.
    self.assertEqual(length(2), length(9))

  def test_policies_compute_different_things_anew(self):
    def products(remat):
      run = lm_config.LmConfig(model=_SCANNED, remat=remat)
      model = models.Transformer(
          _SCANNED, implementation="reference", remat=run.remat
      )
      tokens = jnp.zeros((2, 8), jnp.int32)
      variables = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens))
      loss = lambda v: model.apply(v, tokens).sum()
      return str(jax.make_jaxpr(jax.grad(loss))(variables)).count("dot_general")

    # Of 7 products with weights in a layer `dots` keeps what they gave: the two
    # of attention run again. `full` has the other 6 again, too; what the last
    # one gives, no gradient asks for.
    none, dots, full = map(products, ("none", "dots", "full"))
    self.assertEqual((dots - none, full - dots), (2, 6))
    self.assertEqual(products("offload"), dots)


def plain_state(task):
  return tiny_task.init(task=task)


if __name__ == "__main__":
  absltest.main()
