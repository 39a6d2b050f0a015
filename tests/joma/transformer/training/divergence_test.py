import dataclasses
import os
import pathlib
import signal
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import numpy as np
import pytest

from joma.transformer import config as config_lib
from joma.transformer.text import corpus as corpus_lib
from joma.transformer.training import divergence
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step
from joma.transformer.training import observe
from joma.transformer.training import train
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import metric_stream
from scansnap_jax.experiment.processes import preemption
from tests.joma.transformer.training.made import tiny_task

_CONFIG = lm_config.LmConfig(
    model=config_lib.TransformerConfig(
        num_layers=1,
        embed_dim=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        hidden_dim=8,
    ),
    batch_size=2,
    seq_len=6,
    lr=0.05,
    num_steps=10,
    log_every=2,
    eval_every=2,
    checkpoint_every=4,
    eval_batch_size=2,
    map_steps=(),
)


def _corpus():
  corpus = corpus_lib.load()
  return dataclasses.replace(
      corpus, train=corpus.train[:400], valid=corpus.valid[:50]
  )


def _draw_with(weights):
  """Batches whose weights are multiplied at some steps."""

  def draw(text, seed, steps):
    batches = _DRAW(text, seed, steps)
    factor = np.array([weights.get(int(s), 1.0) for s in steps], np.float32)
    scaled = batches.weights * factor[:, None, None]
    return batches._replace(weights=scaled)

  return draw


_DRAW = observe.draw


class RunTest(parameterized.TestCase):

  def _run(self, weights, workdir=None, on_progress=lambda _: None, **changes):
    config = dataclasses.replace(_CONFIG, **changes)
    workdir = workdir or pathlib.Path(self.create_tempdir().full_path)
    with mock.patch.object(observe, "draw", _draw_with(weights)):
      found = train.train_and_evaluate(
          config, _corpus(), workdir, on_progress=on_progress
      )
    return found, metric_stream.read_rows(workdir / "metrics.jsonl")

  def test_a_step_that_is_skipped_changes_nothing(self):
    # No weight at all: 0 / 0.
    found, rows = self._run({5: 0.0}, on_nan="skip")
    losses = found.history.losses
    self.assertEqual(np.flatnonzero(np.isnan(losses)).tolist(), [5])
    self.assertEqual(
        [row.get("num_skipped") for row in rows],
        [None, None, None, 1, None, None],
    )
    # The mean of the two steps of a row is that of the one that counts.
    np.testing.assert_allclose(rows[3]["train_loss"], losses[4])
    whole, _ = self._run({}, on_nan="skip")
    np.testing.assert_array_equal(losses[:5], whole.history.losses[:5])
    self.assertNotEqual(losses[6], whole.history.losses[6])
    self.assertTrue(
        all(np.isfinite(x).all() for x in jax.tree.leaves(found.params))
    )

  def test_skipping_without_failures_is_the_run_as_it_is(self):
    skipping, _ = self._run({}, on_nan="skip", spike=100.0)
    plain, _ = self._run({})
    chex.assert_trees_all_close(
        skipping.params, plain.params, rtol=1e-5, atol=1e-7
    )

  @pytest.mark.slow
  def test_rolling_back_is_the_state_of_the_checkpoint(self):
    found, rows = self._run({7: np.nan}, on_nan="roll_back")
    valid = found.history.valid_loss
    # Saved at 4; the row of 8 has that state again, and the run learns on.
    self.assertEqual(valid[4], valid[2])
    self.assertNotEqual(valid[3], valid[2])
    self.assertNotEqual(valid[5], valid[4])
    self.assertEqual(rows[4]["num_skipped"], 2)
    self.assertEqual(np.isnan(found.history.losses).tolist()[:7], [False] * 7)

  @parameterized.parameters("skip", "roll_back")
  @pytest.mark.by_default(0)
  def test_a_run_that_is_cut_behind_a_failure_goes_on_bitwise(self, on_nan):
    weights = {3: np.nan, 7: np.nan}
    whole, _ = self._run(weights, on_nan=on_nan)
    workdir, taken = pathlib.Path(self.create_tempdir().full_path), []

    def cut(num_steps):
      taken.append(num_steps)
      if sum(taken) == 4:
        os.kill(os.getpid(), signal.SIGTERM)

    with self.assertRaises(preemption.Stopped):
      self._run(weights, workdir, cut, on_nan=on_nan)
    resumed, _ = self._run(weights, workdir, on_nan=on_nan)
    chex.assert_trees_all_equal(
        (resumed.params, resumed.history), (whole.params, whole.history)
    )

  def test_what_cannot_go_on_says_so(self):
    every = {step: np.nan for step in range(10)}
    with self.assertRaisesRegex(errors.UserError, "skip left out all 2 steps"):
      self._run(every, on_nan="skip")
    with self.assertRaisesRegex(errors.UserError, "back 3 times in a row"):
      self._run(every, on_nan="roll_back")
    with self.assertRaisesRegex(errors.UserError, "diverged between steps 4"):
      self._run({5: np.nan})


class StepTest(absltest.TestCase):

  @pytest.mark.slow
  def test_a_loss_above_the_limit_is_not_learned_from(self):
    task = tiny_task.make_task()
    state, batches = lm_step.init(task), tiny_task.draw_batches(2)
    kept, losses = lm_step.train(state, batches, np.float32(0), task=task)
    chex.assert_trees_all_equal(
        (kept.params, kept.opt_state), (state.params, state.opt_state)
    )
    self.assertEqual(int(kept.step), 2)
    self.assertTrue(np.isfinite(losses).all())
    taken, _ = lm_step.train(state, batches, np.float32(np.inf), task=task)
    plain, _ = lm_step.train(state, batches, task=task)
    chex.assert_trees_all_close(taken, plain, rtol=1e-6)


class GuardTest(parameterized.TestCase):

  def _guard(self, restore=lambda: None, **changes):
    config = dataclasses.replace(_CONFIG, **changes)
    return divergence.Guard(config, None, None, restore)

  def test_a_state_that_comes_back_counts_on(self):
    old = lm_step.TrainState(np.int32(2), {}, {})
    guard = self._guard(lambda: old, on_nan="roll_back")
    interval = mock.Mock(start=4, end=6, steps=np.arange(4, 6))
    losses = np.array([1.0, np.nan], np.float32)
    mended = guard.mend(interval, old, losses, np.float32(np.inf))
    self.assertEqual(mended, (old._replace(step=6), 2, True))

  def test_a_spike_is_above_the_row_before(self):
    guard = self._guard(spike=3.0)
    losses = np.array([9.0, 9.0, 1.0, 2.0, np.nan, np.nan], np.float32)
    self.assertEqual(guard.limit(losses, 4), 4.5)
    self.assertEqual(guard.limit(losses, 0), np.inf)
    self.assertEqual(guard.limit(losses, 6), np.inf)  # Nothing to compare.
    self.assertEqual(self._guard().limit(losses, 4), np.inf)

  def test_a_spike_stops_a_run(self):
    guard = self._guard(spike=3.0)
    interval = mock.Mock(start=4, end=6, steps=np.arange(4, 6))
    losses = np.array([1.0, 5.0], np.float32)
    with self.assertRaisesRegex(errors.UserError, "rose to 5 at step 5"):
      guard.mend(interval, None, losses, np.float32(4.5))
    self.assertIsNone(guard.mend(interval, None, losses, np.float32(5)).state)

  def test_what_is_no_policy_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "spike=1.0 must be above 1"):
      dataclasses.replace(_CONFIG, spike=1.0)


if __name__ == "__main__":
  absltest.main()
