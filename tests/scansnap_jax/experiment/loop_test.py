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
from scansnap_jax.experiment import preemption


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


def _setting(num_steps=10, log_every=4, checkpoint_every=4, noise=1.0):
  layout = ensemble.make_ensemble(2)
  members = np.array([0.0, 100.0], np.float32)
  init, advance = layout.map(_init), layout.map(_advance)

  def record(history, seen, evaluation):
    history.seen[:, evaluation] = seen
    return [{"seed": r, "value": value} for r, value in enumerate(seen)]

  return loop.Setting(
      name="toy/setting",
      tags={"experiment": "toy"},
      num_steps=num_steps,
      log_every=log_every,
      checkpoint_every=checkpoint_every,
      layout=layout,
      init=lambda: init(layout.scatter(members), ()),
      advance=lambda state, start, end: advance(
          state, np.full(end - start, noise, np.float32)
      ),
      record=record,
      describe=lambda r: f"seed={r}",
      rates="noise",
  )


class RunTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir().full_path)

  def _run(self, setting, stop_at=None):
    progress = []
    history = _History(
        np.full((2, setting.num_steps), np.nan, np.float32),
        np.full((2, len(setting.evaluation_steps)), np.nan, np.float32),
    )
    result = loop.run(
        setting,
        history,
        self.workdir,
        on_progress=progress.append,
        stop_requested=lambda: sum(progress) == stop_at,
    )
    return *result, progress

  def _saved(self):
    with checkpoint.Checkpointer(
        self.workdir / "checkpoints" / "toy" / "setting"
    ) as checkpointer:
      return checkpointer.all_steps()

  def test_losses_evaluations_and_rows_are_those_of_their_steps(self):
    history, params, progress = self._run(_setting())
    triangular = np.array([n * (n - 1) / 2 for n in range(11)])
    np.testing.assert_array_equal(history.losses[0], triangular[:-1])
    np.testing.assert_array_equal(history.losses[1], 100 + triangular[:-1])
    np.testing.assert_array_equal(history.seen[0], triangular[[0, 4, 8, 10]])
    np.testing.assert_array_equal(params, [45, 145])
    self.assertEqual(progress, [0, 8, 8, 4])
    rows = metric_stream.read_rows(self.workdir / "metrics.jsonl")
    found = [
        (row["step"], row["value"], row.get("loss"))
        for row in rows
        if row["seed"] == 1
    ]
    self.assertEqual(
        found,
        [(0, 100, None), (4, 106, 103), (8, 128, 121), (10, 145, 136)],
    )

  @parameterized.parameters((4, [8, 10]), (5, [8, 10]), (9, [10]), (99, [10]))
  def test_saves_at_the_evaluation_that_reaches_it_and_at_the_end(
      self, checkpoint_every, saved
  ):
    # The last two are kept; 4 evaluates at 4, 8, 10, of which 9 is reached at
    # 10 alone.
    self._run(_setting(checkpoint_every=checkpoint_every))
    self.assertEqual(self._saved(), saved)

  def test_a_stop_is_saved_and_continued(self):
    setting = _setting(checkpoint_every=99)
    with self.assertRaisesRegex(preemption.Stopped, "setting at step 4 of 10"):
      self._run(setting, stop_at=8)
    self.assertEqual(self._saved(), [4])
    history, params, progress = self._run(setting)
    self.assertEqual(progress, [8, 8, 4])
    rows = metric_stream.read_rows(self.workdir / "metrics.jsonl")
    self.workdir = pathlib.Path(self.create_tempdir().full_path)
    undisturbed = self._run(setting)
    self.assertEqual(
        rows, metric_stream.read_rows(self.workdir / "metrics.jsonl")
    )
    chex.assert_trees_all_equal((history, params), undisturbed[:2])

  def test_divergence_is_told_and_not_saved(self):
    with self.assertRaisesRegex(
        errors.UserError,
        "toy/setting diverged between steps 0 and 4, with seed=0: its last"
        " finite loss is 0 at step .*Use a smaller noise",
    ):
      self._run(_setting(noise=np.inf))
    self.assertEmpty(self._saved())

  def test_divergence_of_the_last_update_is_seen_in_the_parameters(self):
    # The loss of a step is taken before its update, and may be the last one.
    losses, values = np.zeros((2, 12)), {"Y": np.zeros((2, 3, 3))}
    loop.check_finite(_setting(), losses, values, 8)
    values["Y"][1, 0, 0] = np.nan
    with self.assertRaisesRegex(
        errors.UserError, "between steps 8 and 12, with seed=1: .* at step 11"
    ):
      loop.check_finite(_setting(), losses, values, 8)


if __name__ == "__main__":
  absltest.main()
