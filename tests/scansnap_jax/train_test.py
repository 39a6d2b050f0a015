import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import numpy as np
import pytest

from scansnap_jax import config as config_lib
from scansnap_jax import ensemble
from scansnap_jax import train
from scansnap_jax.experiment import checkpoint
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import metric_stream
from scansnap_jax.experiment.processes import preemption

_SMALL = config_lib.ScanSnapConfig(
    data=config_lib.DataConfig(num_next_per_last=2, num_distinct_per_next=3),
    model=config_lib.ModelConfig(zero_init=False),
    num_last=(2,),
    lr_z=(0.5, 2.0),
    lr_ratio=(1.0, 5.0),
    num_seeds=2,
    batch_size=8,
    num_steps=12,
    log_every=4,
    checkpoint_every=4,
)


def _final(results):
  return [(result.params, result.history) for result in results]


def _population_loss(result, r):
  """Of the last weights of run r as T goes to infinity, class by class."""
  decoder, attn_logits = (np.float64(result.params[key][r]) for key in "YZ")
  classes, losses = result.classes, []
  for n, label in enumerate(classes.label):
    weights = classes.probs[n] * np.exp(attn_logits[classes.query[n]])
    logits = weights / np.sqrt((weights**2).sum()) @ decoder
    losses.append(np.log(np.exp(logits).sum()) - logits[label])
  return np.mean(losses)


class TrainAndEvaluateTest(parameterized.TestCase):

  def _workdir(self):
    return pathlib.Path(self.create_tempdir().full_path)

  def test_learning_rates_of_a_seed_share_its_data_and_start(self):
    (result,) = train.train_and_evaluate(_SMALL, self._workdir())
    # Runs are ordered by seed; the loss of step 0 is before any update.
    first = result.history.losses[:, 0].reshape(2, 4)
    np.testing.assert_array_equal(first, first[:, :1].repeat(4, axis=1))
    self.assertNotEqual(first[0, 0], first[1, 0])

  @pytest.mark.slow
  def test_a_run_does_not_depend_on_the_sweep_round_it(self):
    (sweep,) = train.train_and_evaluate(_SMALL, self._workdir())
    alone = dataclasses.replace(
        _SMALL, lr_z=(2.0,), lr_ratio=(1.0,), first_seed=1, num_seeds=1
    )
    (single,) = train.train_and_evaluate(alone, self._workdir())
    chex.assert_trees_all_equal(
        jax.tree.map(lambda leaf: leaf[6:7], (sweep.params, sweep.history)),
        (single.params, single.history),
    )

  @pytest.mark.slow
  def test_log_interval_changes_what_is_recorded_but_not_the_run(self):
    (often,) = train.train_and_evaluate(_SMALL, self._workdir())
    rarely = dataclasses.replace(_SMALL, log_every=5)
    (result,) = train.train_and_evaluate(rarely, self._workdir())
    np.testing.assert_array_equal(result.steps, [0, 5, 10, 12])
    chex.assert_trees_all_close(result.params, often.params, rtol=1e-6)
    chex.assert_trees_all_close(
        result.history.distinct_entropy[:, [0, -1]],
        often.history.distinct_entropy[:, [0, -1]],
        rtol=1e-6,
    )

  def test_records_attention_at_every_evaluation_if_asked(self):
    config = dataclasses.replace(_SMALL, record_attention=True)
    (result,) = train.train_and_evaluate(config, self._workdir())
    chex.assert_shape(
        result.history.attended, (8, 4, 4, result.classes.num_tokens)
    )
    attended = result.history.attended.astype(np.float64)
    np.testing.assert_allclose(attended.sum(-1), 1, rtol=1e-5)
    self.assertFalse(np.isnan(result.history.losses).any())
    # What else was recorded is that of the recorded attention.
    common = (attended * result.classes.is_common).sum(-1).mean(-1)
    distinct = attended * result.classes.is_distinct
    distinct /= distinct.sum(-1, keepdims=True)
    logs = np.log(np.where(distinct > 0, distinct, 1))
    entropy = -(distinct * logs).sum(-1).mean(-1)
    np.testing.assert_allclose(result.history.common_mass, common, rtol=1e-5)
    np.testing.assert_allclose(
        result.history.distinct_entropy, entropy, rtol=1e-5
    )

  def test_metric_rows_are_the_history(self):
    workdir = self._workdir()
    (result,) = train.train_and_evaluate(_SMALL, workdir, experiment="x")
    rows = metric_stream.read_rows(workdir / "metrics.jsonl")
    self.assertLen(rows, 4 * 8)
    self.assertEqual([row["step"] for row in rows[::8]], [0, 4, 8, 12])
    last = rows[-1]
    self.assertEqual(
        (last["experiment"], last["num_last"], last["seed"]), ("x", 2, 1)
    )
    self.assertEqual((last["lr_z"], last["lr_ratio"]), (2.0, 5.0))
    np.testing.assert_allclose(
        last["last_batch_loss"], result.history.losses[-1, 11]
    )
    np.testing.assert_allclose(
        last["distinct_entropy"], result.history.distinct_entropy[-1, -1]
    )
    np.testing.assert_allclose(
        last["common_mass"], result.history.common_mass[-1, -1]
    )
    losses = [_population_loss(result, r) for r in range(8)]
    self.assertGreater(max(losses), 0.01)
    np.testing.assert_allclose(
        [row["population_loss"] for row in rows[-8:]], losses, atol=1e-6
    )
    start = rows[7]
    np.testing.assert_allclose(
        start["common_mass"], result.history.common_mass[-1, 0]
    )
    self.assertNotIn("last_batch_loss", start)

  @pytest.mark.slow
  def test_a_finished_run_is_read_back(self):
    workdir = self._workdir()
    first = train.train_and_evaluate(_SMALL, workdir)
    again = train.train_and_evaluate(_SMALL, workdir)
    chex.assert_trees_all_equal(_final(first), _final(again))

  def test_parameters_that_nobody_asks_for_are_not_saved(self):
    (kept,) = train.train_and_evaluate(_SMALL, self._workdir())
    workdir = self._workdir()
    for _ in range(2):  # The second time from the last checkpoint.
      (lean,) = train.train_and_evaluate(_SMALL, workdir, keep_params=False)
      self.assertIsNone(lean.params)
      chex.assert_trees_all_equal(lean.history, kept.history)
    steps = workdir / "checkpoints" / "scansnap" / "num_last=2"
    names = {
        step: [
            entry["name"].split("'")[1]
            for entry in json.loads(
                (steps / str(step) / "digest" / "metadata").read_text()
            )["body"]["leaves"]
        ]
        for step in (8, 12)
    }
    self.assertEqual(set(names[8]), {"history", "state"})
    self.assertEqual(set(names[12]), {"history"})
    with self.assertRaisesRegex(errors.UserError, "state.* is absent there"):
      train.train_and_evaluate(_SMALL, workdir)

  def test_checkpoints_of_another_shape_are_refused(self):
    workdir = self._workdir()
    train.train_and_evaluate(_SMALL, workdir)
    other = dataclasses.replace(_SMALL, num_seeds=3)
    with self.assertRaisesRegex(errors.UserError, "8.*12"):
      train.train_and_evaluate(other, workdir)

  def test_divergence_names_run_and_step_and_keeps_what_is_good(self):
    workdir = self._workdir()
    # It is seen at the next evaluation, before a checkpoint is due.
    config = dataclasses.replace(
        _SMALL, lr_z=(0.5, 5e37), num_steps=8, checkpoint_every=8
    )
    with self.assertRaisesRegex(
        errors.UserError, r"diverged between steps 0 and 4.*lr_z=5e\+37"
    ):
      train.train_and_evaluate(config, workdir)
    folder = workdir / "checkpoints" / "scansnap" / "num_last=2"
    with checkpoint.Checkpointer(folder) as checkpointer:
      self.assertEmpty(checkpointer.all_steps())
    self.assertEmpty(metric_stream.read_rows(workdir / "metrics.jsonl"))

  @pytest.mark.slow
  def test_a_stop_in_the_last_interval_is_taken_too(self):
    workdir = self._workdir()
    kill = lambda num_run_steps: os.kill(os.getpid(), signal.SIGTERM)
    config = dataclasses.replace(_SMALL, num_steps=4)
    with self.assertRaisesRegex(preemption.Stopped, "step 4 of 4"):
      train.train_and_evaluate(
          config, workdir, on_progress=lambda n: kill(n) if n else None
      )
    (result,) = train.train_and_evaluate(config, workdir)
    self.assertFalse(np.isnan(result.history.losses).any())

  def test_a_stop_is_taken_between_intervals_and_continued_bitwise(self):
    undisturbed = train.train_and_evaluate(_SMALL, self._workdir())
    workdir = self._workdir()
    steps = []

    def terminate_after_first_interval(num_run_steps):
      steps.append(num_run_steps)
      if sum(steps) == 4 * 8:
        os.kill(os.getpid(), signal.SIGTERM)

    with self.assertRaisesRegex(preemption.Stopped, "step 4 of 12"):
      train.train_and_evaluate(
          _SMALL, workdir, on_progress=terminate_after_first_interval
      )
    resumed = train.train_and_evaluate(_SMALL, workdir)
    chex.assert_trees_all_equal(_final(resumed), _final(undisturbed))
    rows = metric_stream.read_rows(workdir / "metrics.jsonl")
    self.assertLen(rows, 4 * 8)

  @pytest.mark.slow
  def test_every_optimizer_and_switch_trains(self):
    for change in (
        dict(optimizer=config_lib.OptimizerConfig(name="adam")),
        dict(
            model=config_lib.ModelConfig(
                parametrization="original", zero_init=False, embed_dim=8
            )
        ),
        dict(data=dataclasses.replace(_SMALL.data, seq_len=None)),
    ):
      config = dataclasses.replace(
          _SMALL, lr_z=(0.1,), num_seeds=1, num_steps=4, **change
      )
      (result,) = train.train_and_evaluate(config, self._workdir())
      self.assertTrue(np.isfinite(result.history.losses).all())


_STORM = """
import dataclasses, hashlib, pathlib, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
from scansnap_jax import config, train
storm = config.ScanSnapConfig(
    data=config.DataConfig(num_next_per_last=2, num_distinct_per_next=3),
    model=config.ModelConfig(zero_init=False), lr_z=(0.5, 2.0), num_seeds=2,
    batch_size=8, num_steps=int(sys.argv[2]), log_every=5, checkpoint_every=10)
(result,) = train.train_and_evaluate(
    storm, pathlib.Path(sys.argv[1]),
    on_progress=lambda num_run_steps: print(num_run_steps // 4, flush=True))
digest = hashlib.sha256()
for leaf in jax.tree.leaves((result.params, result.history)):
  digest.update(leaf.tobytes())
print("digest", digest.hexdigest())
"""


def _storm(workdir, num_steps, kill_after=None, delay=0.0):
  """Runs until done, or SIGKILLs it `delay` s after so many reports."""
  process = subprocess.Popen(
      [sys.executable, "-c", _STORM, str(workdir), str(num_steps)],
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
      cwd=pathlib.Path(__file__).parents[2],
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  with process:
    for reports, line in enumerate(process.stdout):
      if line.startswith("digest"):
        return line
      if kill_after is not None and reports >= kill_after:
        time.sleep(delay)
        process.kill()
        return None
  raise AssertionError(
      f"The run ended early, with status {process.returncode}."
  )


class KillTest(parameterized.TestCase):

  def _check(self, num_kills, num_steps):
    undisturbed = _storm(self.create_tempdir().full_path, num_steps)
    workdir = self.create_tempdir().full_path
    chance = random.Random(0)
    for _ in range(num_kills):
      # Relative to progress, as a start may take any time; the delay lets
      # kills fall into steps and into saves alike.
      result = _storm(
          workdir, num_steps, chance.randint(1, 8), 0.05 * chance.random()
      )
      self.assertIsNone(result, "The run was done before the kill.")
    self.assertEqual(_storm(workdir, num_steps), undisturbed)
    rows = metric_stream.read_rows(pathlib.Path(workdir) / "metrics.jsonl")
    self.assertEqual(
        [row["step"] for row in rows[::4]], list(range(0, num_steps + 1, 5))
    )

  @pytest.mark.slow
  def test_a_kill_leaves_the_final_parameters_bitwise(self):
    self._check(num_kills=1, num_steps=100)

  @pytest.mark.slow
  def test_twenty_kills_leave_the_final_parameters_bitwise(self):
    self._check(num_kills=20, num_steps=1500)


class BitRotTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_one_bit_flipped_in_every_file_is_detected_or_harmless(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    intact = folder / "intact"
    undisturbed = _final(train.train_and_evaluate(_SMALL, intact))
    newest = pathlib.Path("checkpoints", "scansnap", "num_last=2", "12")
    files = sorted(p for p in (intact / newest).rglob("*") if p.is_file())
    self.assertGreater(len(files), 5)
    chance = random.Random(0)
    num_detected = 0
    for number, file in enumerate(files):
      workdir = folder / str(number)
      shutil.copytree(intact, workdir)
      damaged = bytearray(file.read_bytes())
      if damaged:
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
      (workdir / file.relative_to(intact)).write_bytes(damaged)
      # Restored whole, or set aside and trained again from the step before.
      again = _final(train.train_and_evaluate(_SMALL, workdir))
      chex.assert_trees_all_equal(again, undisturbed)
      num_detected += (workdir / newest).with_name("12.corrupt").exists()
    self.assertGreater(num_detected, 0)


class LayoutTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_groups_of_runs_equal_single_runs(self):
    config = dataclasses.replace(_SMALL, num_steps=4)
    classes = train.data.make_classes(config.data, 2)
    runs, shared = train.make_runs(config), train.share(classes)
    batches = train.draw_batches(config, classes, np.arange(4))
    finals = []
    for group_size in (1, 4):
      layout = ensemble.make_ensemble(8, group_size=group_size)
      static = dict(
          model_config=config.model, optimizer_config=config.optimizer
      )
      state = layout.map(train.run_lib.init, **static)(
          layout.scatter(runs), shared
      )
      state, _, _ = layout.map(train.run_lib.train, **static)(
          state, (shared, batches)
      )
      finals.append(layout.gather(state.params))
    chex.assert_trees_all_close(*finals, atol=1e-6)


if __name__ == "__main__":
  absltest.main()
