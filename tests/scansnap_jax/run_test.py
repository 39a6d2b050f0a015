import dataclasses
import functools
import importlib.util
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scansnap_jax import config as config_lib
from scansnap_jax import data
from scansnap_jax import dynamics
from scansnap_jax import model
from scansnap_jax import published
from scansnap_jax import run as run_lib
from scansnap_jax import train
from tests.scansnap_jax import figure4_counts

_SMALL = config_lib.DataConfig(num_next_per_last=2, num_distinct_per_next=3)


def _run(lr_z=1.0, lr_ratio=1.0, seed=0):
  return run_lib.SweepRun(
      seed=jnp.int32(seed),
      stream=jnp.int32(0),
      lr_z=jnp.float32(lr_z),
      lr_ratio=jnp.float32(lr_ratio),
  )


def _shared(classes):
  return jax.tree.map(jnp.asarray, train.share(classes))


@functools.cache
def _compiled(function, **static):
  """One program: operation by operation takes far longer to compile."""
  return jax.jit(functools.partial(function, **static))


def _init(config, run, classes):
  static = dict(model_config=config.model, optimizer_config=config.optimizer)
  return _compiled(run_lib.init, **static)(run, _shared(classes))


def _train(config, run, classes, batches):
  """Trains one run on given batches, [N, B, ...]."""
  static = dict(model_config=config.model, optimizer_config=config.optimizer)
  state = _init(config, run, classes)
  batches = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], batches)
  return _compiled(run_lib.train, **static)(state, (_shared(classes), batches))


class AuthorsRunTest(parameterized.TestCase):

  def test_figure_4_counts_give_the_authors_losses(self):
    config = config_lib.figure4()
    classes = data.make_classes(config.data, 2)
    with np.load(figure4_counts.PATH) as arrays:
      batches = data.Batch(
          arrays["class_index"].astype(np.int32),
          arrays["counts"].astype(np.float32),
      )
    _, losses, _ = _train(config, _run(), classes, batches)
    for step in range(0, 11, 2):
      np.testing.assert_allclose(
          losses[step], published.FIGURE4_LOSSES[step], rtol=1e-5
      )

  def test_the_counts_are_what_torch_draws(self):
    if importlib.util.find_spec("torch") is None:
      self.skipTest("torch, which drew the counts, is not installed")
    classes = data.make_classes(config_lib.figure4().data, 2)
    drawn = figure4_counts.draw(
        classes.support_probs, classes.num_tokens, num_steps=2
    )
    with np.load(figure4_counts.PATH) as arrays:
      np.testing.assert_array_equal(arrays["class_index"][:2], drawn[0])
      np.testing.assert_array_equal(arrays["counts"][:2], drawn[1])


class TrainTest(parameterized.TestCase):

  def _batches(self, config, classes, num_steps, seed=0):
    draw = _compiled(
        run_lib.draw,
        batch_size=config.batch_size,
        seq_len=config.data.seq_len,
    )
    tables = (classes.support_probs, classes.class_cdf)
    pairs = (np.full(num_steps, seed), np.arange(num_steps))
    return draw(*jax.tree.map(jnp.asarray, (pairs, tables)))

  def test_one_plain_sgd_step_follows_lemma_1(self):
    # Batch 1: Y and Z move along Lemma 1's directions, each at its own rate.
    config = config_lib.ScanSnapConfig(
        data=_SMALL,
        model=config_lib.ModelConfig(zero_init=False),
        optimizer=config_lib.OptimizerConfig(name="sgd"),
        batch_size=1,
    )
    classes = data.make_classes(config.data, 2)
    run = _run(lr_z=0.5, lr_ratio=4.0)
    batches = self._batches(config, classes, 1)
    before = _init(config, run, classes).params
    state, _, _ = _train(config, run, classes, batches)
    tokens = _compiled(data.to_token_counts, num_tokens=classes.num_tokens)(
        jax.tree.map(lambda leaf: leaf[0], batches), *_shared(classes)[1:4]
    )
    dy, dz = jax.jit(dynamics.lemma1_gradients)(
        before["Y"],
        before["Z"],
        tokens.counts[0],
        tokens.query[0],
        tokens.label[0],
    )
    # Ten times the largest float32 error seen.
    chex.assert_trees_all_close(
        state.params,
        {"Y": before["Y"] + 2.0 * dy, "Z": before["Z"] + 0.5 * dz},
        atol=2e-6,
    )

  @parameterized.parameters("momentum", "sgd", "adam")
  @pytest.mark.slow
  def test_equals_a_plain_loop_over_steps(self, name):
    config = config_lib.ScanSnapConfig(
        data=_SMALL,
        optimizer=config_lib.OptimizerConfig(name=name, momentum=0.8),
        batch_size=8,
    )
    classes = data.make_classes(config.data, 2)
    batches = self._batches(config, classes, 6)
    state, losses, _ = _train(config, _run(0.1, 3.0), classes, batches)

    rates = {"Y": 0.1 * 3.0, "Z": 0.1}
    make = {
        "momentum": lambda rate: optax.sgd(rate, momentum=0.8),
        "sgd": optax.sgd,
        "adam": optax.adam,
    }[name]
    shape = (classes.num_tokens, classes.num_tokens)
    params = {"Y": jnp.zeros(shape), "Z": jnp.zeros(shape)}
    states = {k: make(rates[k]).init(params[k]) for k in params}
    layer = run_lib.model.make_layer(config.model, classes.num_tokens)
    gradient = jax.jit(
        jax.value_and_grad(
            lambda params, batch: run_lib.mean_loss(
                params, layer, _shared(classes), batch
            )
        )
    )
    for step in range(6):
      batch = jax.tree.map(lambda leaf, i=step: leaf[i], batches)
      loss, grads = gradient(params, batch)
      np.testing.assert_allclose(losses[step], loss, rtol=1e-5)
      for k in params:
        update, states[k] = make(rates[k]).update(grads[k], states[k])
        params[k] = params[k] + update
    chex.assert_trees_all_close(state.params, params, atol=2e-6)

  @pytest.mark.slow
  def test_row_sums_stay_zero_and_only_query_rows_of_z_move(self):
    # Lemma 1's conserved quantities, a check on every step of SGD.
    config = config_lib.ScanSnapConfig(data=_SMALL, batch_size=32)
    classes = data.make_classes(config.data, 3)
    batches = self._batches(config, classes, 50)
    state, _, _ = _train(config, _run(1.0, 2.0), classes, batches)
    for leaf in state.params.values():
      self.assertGreater(float(jnp.abs(leaf).max()), 0.5)
      # Each of 50 steps may round each of M entries by half a unit.
      bound = 50 * np.abs(leaf).sum(axis=1) * np.finfo(np.float32).eps / 2
      np.testing.assert_array_less(np.abs(leaf.sum(axis=1)), bound + 1e-9)
    still = np.setdiff1d(np.arange(classes.num_tokens), classes.query)
    np.testing.assert_array_equal(state.params["Z"][still], 0)

  @pytest.mark.slow
  def test_observes_the_state_before_and_after(self):
    config = config_lib.ScanSnapConfig(data=_SMALL)
    classes = data.make_classes(config.data, 2)
    batches = self._batches(config, classes, 3)
    state, _, (before, after) = _train(config, _run(), classes, batches)
    layer = model.make_layer(config.model, classes.num_tokens)
    chex.assert_trees_all_close(
        before.attended, classes.probs.astype(np.float32), atol=1e-6
    )
    chex.assert_trees_all_close(
        after,
        jax.jit(run_lib.observe, static_argnums=1)(
            state.params, layer, _shared(classes)
        ),
        atol=1e-6,
    )

  @pytest.mark.slow
  def test_the_original_parametrization_learns(self):
    config = config_lib.ScanSnapConfig(
        data=dataclasses.replace(_SMALL, seq_len=None),
        model=config_lib.ModelConfig(
            parametrization="original", zero_init=False, embed_dim=32
        ),
        optimizer=config_lib.OptimizerConfig(name="adam"),
        batch_size=32,
    )
    classes = data.make_classes(config.data, 2)
    batches = self._batches(config, classes, 100)
    _, losses, _ = _train(config, _run(0.02), classes, batches)
    self.assertLess(float(losses[-1]), 0.1 * float(losses[0]))


class DrawTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_a_batch_depends_on_seed_and_step_alone(self):
    config = config_lib.ScanSnapConfig(data=_SMALL, batch_size=8, num_seeds=3)
    classes = data.make_classes(config.data, 2)
    whole = train.draw_batches(config, classes, np.arange(6))
    later = train.draw_batches(config, classes, np.arange(4, 6))
    chex.assert_trees_all_equal(
        jax.tree.map(lambda leaf: leaf[:, 4:], whole), later
    )
    shifted = dataclasses.replace(config, first_seed=2, num_seeds=1)
    chex.assert_trees_all_equal(
        jax.tree.map(lambda leaf: leaf[2:], whole),
        train.draw_batches(shifted, classes, np.arange(6)),
    )

  @pytest.mark.slow
  def test_a_batch_does_not_depend_on_how_many_are_drawn_together(self):
    config = config_lib.ScanSnapConfig(data=_SMALL, batch_size=8, num_seeds=3)
    classes = data.make_classes(config.data, 2)
    whole = train.draw_batches(config, classes, np.arange(5))
    with mock.patch.object(train, "_DRAWN_TOGETHER", 2):
      # 15 batches in groups of two a device, the last one not full.
      parts = train.draw_batches(config, classes, np.arange(5))
    chex.assert_trees_all_equal(whole, parts)

  def test_steps_and_seeds_differ(self):
    config = config_lib.ScanSnapConfig(data=_SMALL, batch_size=64, num_seeds=2)
    classes = data.make_classes(config.data, 2)
    counts = train.draw_batches(config, classes, np.arange(2)).counts
    flat = np.asarray(counts).reshape(4, -1)
    self.assertLen(np.unique(flat, axis=0), 4)


if __name__ == "__main__":
  absltest.main()
