import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.block import data as block_data
from joma.block import ensemble
from joma.block import model
from joma.block import observe
from joma.block import run as block_run
from joma.block import train
from joma.theory import dynamics
from joma.theory import flow

# Float32 over 20 steps: ten times the largest error seen.
_RTOL, _ATOL = 2e-4, 2e-6
_NUM_QUERIES = 2
_DRAW = block_data.DrawContexts(num_classes=4, num_queries=_NUM_QUERIES)
_SOURCE = block_data.ContextSource(np.bool_(False), np.int32(1))


def _setting(attention="softmax", **changes):
  block = model.JomaBlock(
      num_tokens=20,
      hidden_dim=5,
      num_queries=_NUM_QUERIES,
      kind=dynamics.Block(attention=attention, temperature=0.7),
      w_scale=0.3,
      z_scale=0.3,
  )
  arguments = dict(
      blocks=(block,),
      num_classes=4,
      draw=_DRAW,
      activations=("silu", "identity"),
      readout_scale=1.0,
  )
  return block_run.BlockSetting(**(arguments | changes))


def _member(**changes):
  arguments = dict(source=_SOURCE, lr_w=0.2, lr_z=0.2, lr_readout=0.2)
  return ensemble.member(**(arguments | changes))


@jax.jit
def _flow(state):
  """Trains the same state by `flow.descend`, which shares no training code."""
  setting = _setting()
  data = block_run.draw(state.run, 0, setting)
  variables = {"params": state.params["blocks"]["blocks_0"]}
  params, batch = model.to_dynamics(
      setting.blocks[0], variables, data.counts, data.query
  )
  params = params._replace(upper=state.params["readout"])

  def loss(hidden, upper):
    log_probs = jax.nn.log_softmax(hidden @ upper, axis=1)
    return -jnp.take_along_axis(log_probs, data.label[:, None], axis=1).mean()

  block = dynamics.Block(
      attention="softmax", activation="silu", temperature=0.7
  )
  rates = dict(eta_w=0.2, eta_z=0.2)
  return flow.descend(
      *(params, batch, block, loss), **rates, num_records=2, steps_per_record=10
  )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _train(run, setting, num_steps=20, record_every=10):
  start = block_run.init(run, setting=setting)
  return start, train.train(
      start, setting=setting, num_steps=num_steps, record_every=record_every
  )


class TrainTest(parameterized.TestCase):

  def test_follows_gradient_descent_of_the_theory(self):
    start, (_, losses, seen) = _train(_member(), _setting())
    path = _flow(start)
    block = seen.blocks[0]
    same = lambda a, b: chex.assert_trees_all_close(
        a, b, rtol=_RTOL, atol=_ATOL
    )
    same(block.attn_logits, path.params.attn_logits)
    same(block.v, path.v)
    same(block.attended, path.attended)
    # Also Theorem 1's second term, for a read-out that trains.
    same(block.correction, path.correction)
    self.assertGreater(np.abs(path.correction[-1]).max(), 1e-3)
    self.assertEqual(losses.shape, (20,))
    same(seen.loss[:2], losses[::10])

  @pytest.mark.slow
  def test_a_rate_of_zero_freezes(self):
    run = _member(lr_z=0.0, lr_readout=0.0)
    start, (end, _, seen) = _train(run, _setting())
    chex.assert_trees_all_equal(start.params["readout"], end.params["readout"])
    logits = seen.blocks[0].attn_logits
    np.testing.assert_array_equal(logits[0], logits[-1])
    self.assertGreater(
        np.abs(seen.blocks[0].v[-1] - seen.blocks[0].v[0]).max(), 0.01
    )

  def test_gradient_of_the_stationary_loss_never_changes(self):
    # Linear, attention and read-out frozen: W then moves along a line.
    run = _member(lr_z=0.0, lr_readout=0.0, is_stationary=True, activation=1)
    _, (_, _, seen) = _train(run, _setting())
    v = seen.blocks[0].v
    np.testing.assert_allclose(v[2] - v[1], v[1] - v[0], atol=1e-5)
    self.assertGreater(np.abs(v[1] - v[0]).max(), 0.01)
    # The cross-entropy's fades.
    _, (_, _, seen) = _train(
        run._replace(is_stationary=np.bool_(False)), _setting()
    )
    v = seen.blocks[0].v
    self.assertGreater(np.abs(v[2] - 2 * v[1] + v[0]).max(), 1e-4)

  @pytest.mark.slow
  def test_no_step_leads_beyond_the_largest_logit(self):
    run = _member(is_stationary=True, activation=1, lr_w=2.0, lr_z=2.0)
    limit = 3.0
    setting = _setting("exp", max_attn_logit=limit)
    _, (_, _, seen) = _train(run, setting, 200, 100)
    scaled = np.abs(seen.blocks[0].attn_logits / 0.7).max(axis=(1, 2))
    self.assertBetween(scaled[-1], 0.3 * limit, limit)
    self.assertTrue(np.isfinite(seen.loss).all())

  @pytest.mark.slow
  def test_fresh_batches_are_a_function_of_seed_and_step(self):
    probs = block_data.class_probs(num_classes=4, num_distinct=4, num_common=4)
    setting = _setting(
        draw=block_data.DrawSequences(16, 8), has_fresh_batches=True
    )
    run = _member(source=probs, lr_w=0.0, lr_z=0.0, lr_readout=0.0)
    start, (_, losses, _) = _train(run, setting, 8, 4)
    # Nothing learns, so that each step's loss is that of its own batch.
    loss_of = jax.jit(
        lambda state, batch: observe.observe(state, batch, setting).loss
    )
    for step in (0, 5):
      expected = loss_of(start, block_run.draw(run, step, setting))
      np.testing.assert_allclose(losses[step], expected, rtol=1e-5)
    self.assertGreater(np.ptp(losses), 1e-3)
    drawn = [block_run.draw(run, step, setting).counts for step in (0, 1)]
    held_out = block_run.draw_held_out(run, setting).counts
    for other in (drawn[1], held_out):
      self.assertGreater(np.abs(drawn[0] - other).max(), 0)

  def test_records_must_divide_the_steps(self):
    with self.assertRaisesRegex(ValueError, "num_steps=5 is no multiple"):
      _train(_member(), _setting(), 5, 2)


class ObserveTest(absltest.TestCase):

  @pytest.mark.slow
  def test_of_a_stack_reads_each_block(self):
    sizes = ((20, 6), (6, 3))
    blocks = tuple(
        model.JomaBlock(
            num_tokens=below,
            hidden_dim=above,
            num_queries=_NUM_QUERIES,
            embedding="orthonormal",
            w_scale=0.5,
            z_scale=0.0,
        )
        for below, above in sizes
    )
    setting = _setting(blocks=blocks)
    start, (end, _, seen) = _train(_member(activation=0), setting)
    for i, (below, above) in enumerate(sizes):
      block = seen.blocks[i]
      weights = end.params["blocks"][model.block_name(i)]["W"]
      self.assertEqual(block.v.shape, (3, below, above))
      embedding = end.constants[model.block_name(i)]["U"][:below]
      np.testing.assert_allclose(
          block.v[-1], embedding @ weights, rtol=1e-4, atol=1e-5
      )
      np.testing.assert_allclose(block.embedding_norms, 1, rtol=1e-5)
      np.testing.assert_allclose(block.entropy[0], np.log(below), rtol=1e-5)
      self.assertLess(block.entropy[-1], block.entropy[0])
      squares = np.linalg.svd(weights, compute_uv=False) ** 2
      np.testing.assert_allclose(
          block.stable_rank[-1], squares.sum() / squares[0], rtol=1e-4
      )
      squares = np.linalg.svd(weights - start.start[i], compute_uv=False) ** 2
      np.testing.assert_allclose(
          block.stable_rank_change[-1], squares.sum() / squares[0], rtol=1e-2
      )
      self.assertEqual(block.stable_rank_change[0], 0)


if __name__ == "__main__":
  absltest.main()
