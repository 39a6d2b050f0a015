import pathlib
from typing import Any, NamedTuple

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax.numpy as jnp
import numpy as np

from scansnap_jax import ensemble
from scansnap_jax.experiment import checkpoint
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import loop
from scansnap_jax.experiment import metric_stream
from scansnap_jax.experiment.processes import preemption


class _State(NamedTuple):
  params: Any
  step: Any


class _History(NamedTuple):
  losses: np.ndarray
  seen: np.ndarray


def _init(member, shared):
  del shared
  return _State(member, jnp.int32(0))


def _advance(state, noise):
  """Adds each step's number to the parameter; its loss is the value before."""
  steps = state.step + jnp.arange(noise.shape[0])
  after = state.params + jnp.cumsum(steps * noise)
  before = jnp.concatenate([state.params[None], after[:-1]])
  end = _State(after[-1], state.step + noise.shape[0])
  return end, before, (state.params, after[-1])


class _Config(NamedTuple):
  num_steps: int = 10
  log_every: int = 4
  checkpoint_every: int = 4


def _recorder(workdir):
  return loop.Recorder(
      workdir,
      "toy/setting",
      tags={"experiment": "toy"},
      runs=["seed=0", "seed=1"],
      rates="noise",
  )


def _train(workdir, config, noise=1.0, stop_at=None):
  """A loop as the `train` modules write it; also returns its progress."""
  layout, members = ensemble.make_ensemble(2), np.array([0, 100], np.float32)
  init, advance = layout.map(_init), layout.map(_advance)
  schedule = loop.make_schedule(config)
  empty = lambda number: np.full((2, number), np.nan, np.float32)
  history = _History(
      empty(config.num_steps), empty(len(schedule.evaluation_steps))
  )
  members = layout.scatter(members)
  progress = []
  with _recorder(workdir) as recorder:
    start, state, history = loop.resume(
        recorder, layout, init, (members, ()), history
    )
    progress.append(2 * start)
    for interval in schedule.intervals(start):
      steps = np.full(len(interval.steps), noise, np.float32)
      state, *seen = advance(state, steps)
      losses, (before, after) = layout.gather(seen)
      history.losses[:, interval.steps] = losses
      is_finite = layout.is_finite(after)
      recorder.check_finite(interval, history.losses, is_finite)
      if interval.start == 0:
        history.seen[:, 0] = before
        recorder.write(0, _rows(before))
      history.seen[:, interval.evaluation] = after
      recorder.write(interval.end, _rows(after), losses[:, -1])
      progress.append(2 * len(interval.steps))
      if interval.end == stop_at or interval.is_saved:
        loop.save(recorder, layout, interval, state, history)
      if interval.end == stop_at:
        recorder.stop(interval, config.num_steps)
  return history, layout.gather(state.params), progress


def _rows(seen):
  return [{"seed": r, "value": value} for r, value in enumerate(seen)]


class ScheduleTest(parameterized.TestCase):

  def test_intervals_cover_all_steps_from_any_evaluation_on(self):
    schedule = loop.make_schedule(_Config())
    np.testing.assert_array_equal(schedule.evaluation_steps, [0, 4, 8, 10])
    found = [(*i[:3], *i.steps) for i in schedule.intervals(0)]
    self.assertEqual(
        found,
        [(0, 4, 1, 0, 1, 2, 3), (4, 8, 2, 4, 5, 6, 7), (8, 10, 3, 8, 9)],
    )
    for start, left in ((4, 2), (8, 1), (10, 0)):
      self.assertLen([*schedule.intervals(start)], left)

  @parameterized.parameters(
      (4, [4, 8, 10]), (5, [8, 10]), (9, [10]), (99, [10]), (1, [4, 8, 10])
  )
  def test_saves_at_the_evaluation_that_reaches_it_and_at_the_end(
      self, checkpoint_every, saved
  ):
    schedule = loop.make_schedule(_Config(checkpoint_every=checkpoint_every))
    found = [i.end for i in schedule.intervals(0) if i.is_saved]
    self.assertEqual(found, saved)


class RecorderTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir().full_path)

  def _saved(self):
    with checkpoint.Checkpointer(
        self.workdir / "checkpoints" / "toy" / "setting"
    ) as checkpointer:
      return checkpointer.all_steps()

  def test_losses_evaluations_and_rows_are_those_of_their_steps(self):
    history, params, progress = _train(self.workdir, _Config())
    triangular = np.array([n * (n - 1) / 2 for n in range(11)])
    np.testing.assert_array_equal(history.losses[0], triangular[:-1])
    np.testing.assert_array_equal(history.losses[1], 100 + triangular[:-1])
    np.testing.assert_array_equal(history.seen[0], triangular[[0, 4, 8, 10]])
    np.testing.assert_array_equal(params, [45, 145])
    self.assertEqual(progress, [0, 8, 8, 4])
    rows = metric_stream.read_rows(self.workdir / "metrics.jsonl")
    found = [
        (row["step"], row["value"], row.get("last_batch_loss"))
        for row in rows
        if row["seed"] == 1
    ]
    self.assertEqual(
        found,
        [(0, 100, None), (4, 106, 103), (8, 128, 121), (10, 145, 136)],
    )

  def test_a_stop_is_saved_and_continued(self):
    config = _Config(checkpoint_every=99)
    with self.assertRaisesRegex(preemption.Stopped, "setting at step 4 of 10"):
      _train(self.workdir, config, stop_at=4)
    self.assertEqual(self._saved(), [4])
    history, params, progress = _train(self.workdir, config)
    self.assertEqual(progress, [8, 8, 4])
    rows = metric_stream.read_rows(self.workdir / "metrics.jsonl")
    self.workdir = pathlib.Path(self.create_tempdir().full_path)
    undisturbed = _train(self.workdir, config)
    self.assertEqual(
        rows, metric_stream.read_rows(self.workdir / "metrics.jsonl")
    )
    chex.assert_trees_all_equal((history, params), undisturbed[:2])

  def test_divergence_is_told_and_not_saved(self):
    with self.assertRaisesRegex(
        errors.UserError,
        "toy/setting diverged between steps 0 and 4, with seed=0: its last"
        r" finite loss is 0 at step \d\. Use a smaller noise",
    ):
      _train(self.workdir, _Config(), noise=np.inf)
    # Of nothing it is said that it was kept.
    self.assertEmpty(metric_stream.read_rows(self.workdir / "metrics.jsonl"))
    self.assertEmpty(self._saved())

  def test_divergence_of_the_last_update_is_seen_in_the_parameters(self):
    # The loss of a step is taken before its update, and may be the last one.
    losses = np.zeros((2, 16))
    losses[:, 12:] = np.nan  # Still to come.
    interval = loop.Interval(8, 12, 3, True)
    history = _History(losses, np.zeros((2, 4)))
    with _recorder(self.workdir) as recorder:
      recorder.check_finite(interval, losses, np.array([True, True]))
      with self.assertRaisesRegex(
          errors.UserError,
          "between steps 8 and 12, with seed=1: .* at step 11. Metrics up to"
          " step 8 are kept.",
      ):
        is_finite = np.array([True, False])
        recorder.save(interval, {"Y": np.zeros(2)}, history, is_finite)
    self.assertEmpty(self._saved())


if __name__ == "__main__":
  absltest.main()
