import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.hierarchy import data
from joma.hierarchy import model as hierarchy_model
from joma.hierarchy import run as hierarchy_train
from joma.hierarchy import scores as hierarchy_scores

# Gradients below 1, of 48 sequences added up in another order.
_ATOL = 1e-6
_ATOL_X64 = 1e-12
# Tests compile much and run little.
_FAST_COMPILE = {"xla_backend_optimization_level": "0"}
# Without a block, logits are a linear function of the last token's embedding:
# enough for what does not depend on the model, and fast to compile.
_LINEAR = hierarchy_model.HierarchyTransformer(
    num_tokens=20, num_classes=6, num_layers=0, embed_dim=8, hidden_dim=12
)
_MODEL = dataclasses.replace(_LINEAR, num_layers=2)


@functools.cache
def _hierarchy():
  return data.make_hierarchy(
      0, num_tokens=20, num_latents=(8, 6), set_sizes=(2, 2)
  )


def _run(dtype=np.float32, seed=3):
  made = _hierarchy()
  write = lambda is_present: data.merge_padding(
      data.to_tokens(is_present, 9), made.max_tokens
  )
  tokens, num_padding = write(made.is_present)
  unseen = data.unseen_classes(0, made, 7)
  latents = hierarchy_train.Latents(
      activity=made.activity,
      unseen_tokens=write(made.tokens_of(unseen))[0],
      unseen_activity=(*made.expand(unseen), np.zeros((7, 6), bool)),
      unseen_weights=np.full(7, 1 / 7, dtype),
  )
  run = hierarchy_train.TableRun(
      seed=np.int32(seed),
      lr=dtype(0.01),
      weight_decay=dtype(0.1),
      tokens=tokens,
      num_padding=np.int32(num_padding),
      latents=latents,
  )
  return jax.tree.map(jnp.asarray, run)


def _jit(fn, model=_LINEAR, **static):
  return jax.jit(
      functools.partial(fn, model=model, **static),
      compiler_options=_FAST_COMPILE,
  )


def _start(dtype=np.float32, model=_LINEAR):
  state = _jit(hierarchy_train.init, model)(_run(dtype))
  cast = lambda leaf: leaf.astype(dtype) if leaf.dtype.kind == "f" else leaf
  return jax.tree.map(cast, state)


class ClassCountingTest(parameterized.TestCase):
  """One sequence a class, weighted, is the batch of all drawn sequences."""

  def _value_and_grad(self, state, tokens, labels, weights):
    loss = functools.partial(hierarchy_train.weighted_loss, model=_LINEAR)
    return jax.jit(jax.value_and_grad(loss), compiler_options=_FAST_COMPILE)(
        state.params,
        tokens=tokens,
        labels=labels,
        weights=weights,
        num_padding=state.run.num_padding,
    )

  @parameterized.parameters((np.float32, _ATOL), (np.float64, _ATOL_X64))
  @pytest.mark.by_default(0)
  def test_loss_and_gradient_are_those_of_the_batch(self, dtype, atol):
    with jax.enable_x64(dtype == np.float64):
      state = _start(dtype)
      labels = hierarchy_train.draw_labels(3, 5, 6, 48)
      batch = self._value_and_grad(
          state,
          state.run.tokens[labels],
          labels,
          jnp.full(48, 1 / 48, dtype),
      )
      counts = np.bincount(labels, minlength=6)
      self.assertGreater(counts.max(), counts.min())
      counted = self._value_and_grad(
          state,
          state.run.tokens,
          jnp.arange(6),
          jnp.asarray(counts / 48, dtype),
      )
      chex.assert_trees_all_close(counted, batch, rtol=0, atol=atol)
      even = self._value_and_grad(
          state, state.run.tokens, jnp.arange(6), jnp.full(6, 1 / 6, dtype)
      )
      self.assertGreater(abs(even[0] - batch[0]), 1e-3)

  @pytest.mark.slow
  def test_training_takes_the_same_steps_with_and_without(self):
    with jax.enable_x64():
      sizes = dict(batch_size=16, num_steps=3)
      ends = [
          _jit(
              hierarchy_train.descend,
              count_classes=saving,
              last_only=saving,
              **sizes,
          )(_start(np.float64))
          for saving in (True, False)
      ]
      # Adam divides by the root of a squared gradient, which magnifies what
      # rounding leaves of zeros by up to 1/eps = 1e8 times the rate, .01.
      chex.assert_trees_all_close(ends[0][1], ends[1][1], rtol=0, atol=1e-10)
      chex.assert_trees_all_close(
          ends[0][0].params, ends[1][0].params, rtol=0, atol=1e-8
      )


class DescendTest(absltest.TestCase):

  @pytest.mark.slow
  def test_steps_are_adam_on_the_gradient_plus_decay(self):
    with jax.enable_x64():
      state = _start(np.float64)
      end, losses = _jit(hierarchy_train.descend, batch_size=16, num_steps=2)(
          state
      )
      params, first, second = jax.tree.map(np.asarray, state.params), 0, 0
      grad = _jit(jax.grad(hierarchy_train.weighted_loss))
      for step in range(2):
        labels = hierarchy_train.draw_labels(3, step, 6, 16)
        run = state.run
        grads = grad(
            params,
            tokens=run.tokens[labels],
            labels=labels,
            weights=jnp.full(16, 1 / 16),
            num_padding=run.num_padding,
        )
        grads = jax.tree.map(
            lambda g, p: np.asarray(g) + 0.1 * p, grads, params
        )
        if step == 0:
          first = second = jax.tree.map(np.zeros_like, grads)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = jax.tree.map(
            lambda v, g: 0.999 * v + 0.001 * g**2, second, grads
        )
        params = jax.tree.map(
            lambda p, m, v, t=step + 1: p
            - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8),
            *(params, first, second),
        )
      # See above; gradients that vanish exactly without rounding move by noise.
      chex.assert_trees_all_close(end.params, params, rtol=0, atol=1e-8)
      self.assertEqual(int(end.step), 2)
      self.assertEqual(losses.shape, (2,))

  @pytest.mark.slow
  def test_a_run_in_two_parts_is_the_run(self):
    state = _start()
    descend = functools.partial(hierarchy_train.descend, batch_size=4)
    part = _jit(descend, num_steps=2)
    middle, first = part(state)
    end, second = part(middle)
    whole, losses = _jit(descend, num_steps=4)(state)
    np.testing.assert_allclose(np.append(first, second), losses, atol=_ATOL)
    self.assertEqual(int(end.step), int(whole.step))
    again, _ = part(state)
    chex.assert_trees_all_equal(again, middle)

  def test_labels_differ_by_seed_and_step_and_are_even(self):
    draw = jax.jit(hierarchy_train.draw_labels, static_argnums=(2, 3))
    labels = [draw(*pair, 6, 600) for pair in ((0, 0), (0, 1), (1, 0))]
    self.assertFalse((labels[0] == labels[1]).all())
    self.assertFalse((labels[0] == labels[2]).all())
    counts = np.bincount(np.concatenate(labels), minlength=6)
    # 300 each, with a standard deviation of sqrt(1800 5/36) = 15.8.
    self.assertLess(np.abs(counts - 300).max(), 5 * 15.8)

  def test_permuted_labels_are_the_same_problem(self):
    # Training on permuted labels is no baseline: with the output layer permuted
    # alike, all else learns what it did.
    params, run = (state := _start()).params, state.run
    order = np.array([3, 5, 0, 1, 2, 4])
    renamed = params | {
        "classes_w": params["classes_w"][:, order],
        "classes_b": params["classes_b"][order],
    }
    grad = _jit(jax.grad(hierarchy_train.weighted_loss))
    grads, others = (
        grad(
            own,
            tokens=tokens,
            labels=jnp.arange(6),
            weights=jnp.full(6, 1 / 6),
            num_padding=run.num_padding,
        )
        for own, tokens in ((params, run.tokens), (renamed, run.tokens[order]))
    )
    chex.assert_trees_all_close(
        others["embedding"], grads["embedding"], atol=_ATOL
    )
    chex.assert_trees_all_close(
        others["classes_w"], grads["classes_w"][:, order], atol=_ATOL
    )


class ObserveTest(absltest.TestCase):

  @pytest.mark.slow
  def test_scores_are_those_of_each_level_and_its_block(self):
    state = _start(model=_MODEL)
    run = state.run
    found = _jit(hierarchy_train.observe, _MODEL, num_shuffles=3)(
        run, state.params
    )
    forward = _jit(_forward, _MODEL)
    logits, hidden = forward(state.params, run.tokens, run.num_padding)
    unseen = run.latents.unseen_tokens
    _, unseen_hidden = forward(state.params, unseen, run.num_padding)
    accuracy = (np.argmax(logits, axis=1) == np.arange(6)).mean()
    self.assertAlmostEqual(float(found.accuracy), accuracy)
    self.assertLen(found.scores, 2)
    for level, scores in enumerate(found.scores):
      pooled = np.max(hidden[level], axis=1)
      activity = _hierarchy().activity[level]
      is_used = activity.any(axis=0) & ~activity.all(axis=0)
      varies = pooled.std(axis=0) > 1e-4
      num = is_used.sum()
      both = np.corrcoef(activity[:, is_used], pooled[:, varies], rowvar=False)[
          :num, num:
      ]
      expected = both.max(axis=1)
      # Constant nodes, such as dead ones, have correlation 0.
      expected = expected if varies.all() else np.maximum(expected, 0)
      np.testing.assert_allclose(scores.own[is_used], expected, atol=1e-5)
      np.testing.assert_array_equal(scores.own[~is_used], 0)
    # Level 1 are the classes here, of which unseen combinations hold none.
    np.testing.assert_array_equal(found.scores[1].transferred, 0)
    best = hierarchy_scores.correlations(
        jnp.max(unseen_hidden[0], axis=1),
        run.latents.unseen_activity[0],
    ).max(axis=1)
    np.testing.assert_allclose(found.scores[0].unseen, best, atol=1e-5)


def _forward(params, tokens, num_padding, *, model):
  logits, seen = model.apply(
      {"params": params}, tokens, num_padding, mutable="intermediates"
  )
  blocks = seen["intermediates"]
  return logits, [blocks[f"block_{i}"]["hidden"][0] for i in range(2)]


if __name__ == "__main__":
  absltest.main()
