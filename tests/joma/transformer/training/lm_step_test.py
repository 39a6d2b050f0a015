import dataclasses
import math

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import config as config_lib
from joma.transformer.text import batches as batches_lib
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step

_CONFIG = lm_config.LmConfig(
    model=config_lib.TransformerConfig(
        vocab_size=11,
        num_layers=1,
        embed_dim=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        hidden_dim=12,
        tie_embeddings=False,
    ),
    batch_size=4,
    seq_len=6,
    optimizer="sgd",
    weight_decay=0.0,
    clip_norm=None,
    warmup_steps=0,
    schedule="constant",
    lr=0.5,
)


def _task(**changes):
  # The reference compiles soonest.
  config = dataclasses.replace(_CONFIG, **changes)
  return lm_step.make_task(config, 10, 5, implementation="reference")


def _batches(num_steps, num_rows=4, seq_len=6, seed=0):
  draw = np.random.default_rng(seed).integers
  inputs, targets = draw(0, 11, (2, num_steps, num_rows, seq_len), np.int32)
  return batches_lib.Batch(
      jnp.asarray(inputs), jnp.asarray(targets), jnp.ones(inputs.shape)
  )


_jit_init = jax.jit(lm_step.init, static_argnames="task")
_jit_train = jax.jit(lm_step.train, static_argnames="task")


def setUpModule():
  # These tests compile much and run little.
  jax.config.update("jax_disable_most_optimizations", True)


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


def _train(task, batches):
  return _jit_train(_jit_init(task=task), batches, task=task)


class TokenLossesTest(absltest.TestCase):

  def test_value_and_gradient_are_those_of_the_definition(self):
    keys = jax.random.split(jax.random.key(0), 3)
    logits = 5 * jax.random.normal(keys[0], (2, 3, 7))
    targets = jax.random.randint(keys[1], (2, 3), 0, 7)
    cotangents = jax.random.normal(keys[2], (2, 3))

    def defined(logits):
      log_probs = jax.nn.log_softmax(logits)
      return -(log_probs * jax.nn.one_hot(targets, 7)).sum(axis=-1)

    expected, pull = jax.vjp(defined, logits)
    found, ours = jax.vjp(lambda x: lm_step.token_losses(x, targets), logits)
    # A few roundings of numbers up to 20.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        ours(cotangents)[0], pull(cotangents)[0], rtol=1e-5, atol=1e-6
    )


class TrainTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.batches = _batches(3)
    cls.state, cls.losses = _train(_task(), cls.batches)

  @pytest.mark.slow
  def test_losses_fall_on_a_batch_seen_again(self):
    again = jax.tree.map(lambda leaf: leaf[:1].repeat(3, 0), self.batches)
    _, losses = _train(_task(), again)
    self.assertAlmostEqual(float(losses[0]), math.log(11), delta=1)
    self.assertTrue((np.diff(losses) < 0).all())

  def test_padding_changes_nothing(self):
    pad = lambda leaf: jnp.pad(leaf, ((0, 0), (0, 0), (0, 3)))
    padded = jax.tree.map(pad, self.batches)
    state, losses = _train(_task(), padded)
    np.testing.assert_allclose(losses, self.losses, rtol=1e-5)
    chex.assert_trees_all_close(state.params, self.state.params, atol=1e-5)

  @parameterized.parameters(dict(grad_accum=2), dict(use_remat=True))
  @pytest.mark.slow
  def test_saving_memory_changes_nothing(self, **change):
    # The parts of an uneven batch count by their tokens.
    weights = self.batches.weights.at[:, 0, 2:].set(0)
    uneven = self.batches._replace(weights=weights)
    expected_state, expected = _train(_task(), uneven)
    state, losses = _train(_task(**change), uneven)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    chex.assert_trees_all_close(state.params, expected_state.params, atol=1e-5)

  @pytest.mark.slow
  def test_bfloat16_is_near_and_keeps_float32_parameters(self):
    state, losses = _train(_task(dtype="bfloat16"), self.batches)
    # 8 bits of mantissa.
    np.testing.assert_allclose(losses, self.losses, rtol=2**-6)
    self.assertGreater(np.abs(losses - self.losses).max(), 0)
    chex.assert_trees_all_equal_dtypes(state, self.state)

  @pytest.mark.slow
  def test_what_is_dropped_depends_on_the_step_alone(self):
    model = dataclasses.replace(_CONFIG.model, dropout=0.5)
    same = jax.tree.map(lambda leaf: leaf[:1].repeat(3, 0), self.batches)
    frozen = dict(model=model, lr=1e-30)
    task = _task(**frozen)
    _, losses = _train(task, same)
    self.assertGreater(np.abs(np.diff(losses)).min(), 1e-4)
    late = _jit_init(task=task)._replace(step=jnp.int32(2))
    _, later = _jit_train(late, same, task=task)
    np.testing.assert_allclose(later[0], losses[2], rtol=1e-5)

  @pytest.mark.slow
  def test_evaluation_drops_nothing_and_counts_every_token_once(self):
    model = dataclasses.replace(_CONFIG.model, dropout=0.5, attn_dropout=0.5)
    batches = _batches(3, num_rows=2)
    weights = batches.weights.at[2, 1].set(0)
    batches = batches._replace(weights=weights)
    params = _jit_init(task=_task()).params
    found = lm_step.evaluate(params, batches, task=_task(model=model))
    logits = _task().model.apply(
        {"params": params}, batches.inputs.reshape(6, 6)
    )
    losses = lm_step.token_losses(logits, batches.targets.reshape(6, 6))
    np.testing.assert_allclose(found, losses[:5].mean(), rtol=1e-5)


class ProbeTest(absltest.TestCase):

  @pytest.mark.slow
  def test_uniform_attention_over_35_positions(self):
    task = _task(seq_len=35)
    params = _jit_init(task=task).params
    attn = params["layers_0"]["attn"]
    attn["query"]["kernel"] = jnp.zeros_like(attn["query"]["kernel"])
    batches = _batches(2, num_rows=2, seq_len=35)
    found = lm_step.probe(params, batches, task=task)
    # ln(35!) / 35.
    np.testing.assert_allclose(found.entropy, [2.63250], atol=1e-4)
    np.testing.assert_allclose(found.effective_support, [18], rtol=1e-5)
    # The first token has 1 / t of the t-th query, .118 in the mean.
    np.testing.assert_array_equal(found.sink_rate, [0])
    kernel = np.array(params["layers_0"]["mlp"]["up"]["kernel"])
    squares = np.linalg.svd(kernel, compute_uv=False) ** 2
    np.testing.assert_allclose(
        found.stable_rank, [squares.sum() / squares[0]], rtol=1e-5
    )

  @pytest.mark.slow
  def test_padding_is_not_probed(self):
    task = _task()
    params = _jit_init(task=task).params
    batches = _batches(1)
    weights = batches.weights.at[..., 2:].set(0)
    found = lm_step.probe(params, batches._replace(weights=weights), task=task)
    half = jax.tree.map(lambda leaf: leaf[..., :2], batches)
    expected = lm_step.probe(params, half, task=task)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)

  def test_probes_are_means_over_all_batches(self):
    task = _task()
    params = _jit_init(task=task).params
    batches = _batches(3)
    one_by_one = [
        lm_step.probe(
            params,
            jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batches),
            task=task,
        )
        for i in range(3)
    ]
    found = lm_step.probe(params, batches, task=task)
    for name in ("entropy", "effective_support"):
      parts = [getattr(part, name) for part in one_by_one]
      self.assertGreater(np.ptp(parts, axis=0).max(), 1e-4)
      np.testing.assert_allclose(
          getattr(found, name), np.mean(parts, axis=0), rtol=1e-5
      )

  @pytest.mark.slow
  def test_maps_are_of_the_first_sequence(self):
    task = _task()
    params = _jit_init(task=task).params
    batches = _batches(2)
    maps = lm_step.attn_maps(params, batches, task=task)
    self.assertEqual(maps.shape, (1, 2, 6, 6))
    _, seen = task.model.apply(
        {"params": params}, batches.inputs[0], mutable="intermediates"
    )
    weights = seen["intermediates"]["layers_0"]["attn"]["attn_weights"][0]
    np.testing.assert_allclose(maps[0], weights[0], rtol=1e-5)


if __name__ == "__main__":
  absltest.main()
