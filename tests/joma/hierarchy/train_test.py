import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import numpy as np
import pytest

from joma.hierarchy import config as config_lib
from joma.hierarchy import data
from joma.hierarchy import run
from joma.hierarchy import train
from kernels_pallas.aot import chips
from kernels_pallas.aot import topology
from scansnap_jax import ensemble
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import metric_stream
from scansnap_jax.experiment.processes import preemption

# Three blocks, which take long to compile: all tests share one program.
_SMALL = config_lib.Table1Config(
    num_classes=(4,),
    num_combinations=(2,),
    num_latents_0=(5,),
    num_latents_1=(6,),
    num_seeds=2,
    num_tokens=10,
    seq_len=12,
    embed_dim=8,
    hidden_multiple=1,
    lr=0.01,
    batch_size=8,
    num_steps=6,
    log_every=2,
    checkpoint_every=2,
    num_unseen=16,
    num_shuffles=2,
)
_CELL = train.Cell(4, 2, (5, 6))


def _final(results):
  return [(result.params, result.history) for result in results]


class TrainAndEvaluateTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    # These tests compile much and run little.
    jax.config.update("jax_disable_most_optimizations", True)
    cls.addClassCleanup(
        jax.config.update, "jax_disable_most_optimizations", False
    )

  def _workdir(self):
    return pathlib.Path(self.create_tempdir().full_path)

  @pytest.mark.slow
  def test_a_stop_is_continued_bitwise_and_the_end_is_read_back(self):
    whole = self._workdir()
    undisturbed = train.train_and_evaluate(_SMALL, whole)
    workdir, steps = self._workdir(), []

    def terminate_after_first_interval(num_run_steps):
      steps.append(num_run_steps)
      if sum(steps) == 4:
        os.kill(os.getpid(), signal.SIGTERM)

    with self.assertRaisesRegex(
        preemption.Stopped, r"table1/C=4,N_ch=2,latents=5\+6 at step 2 of 6"
    ):
      train.train_and_evaluate(
          _SMALL, workdir, on_progress=terminate_after_first_interval
      )
    resumed = train.train_and_evaluate(_SMALL, workdir)
    chex.assert_trees_all_equal(_final(resumed), _final(undisturbed))
    rows = metric_stream.read_rows(workdir / "metrics.jsonl")
    self.assertEqual(rows, metric_stream.read_rows(whole / "metrics.jsonl"))
    again = train.train_and_evaluate(_SMALL, workdir)
    chex.assert_trees_all_equal(_final(again), _final(undisturbed))

    (result,) = undisturbed
    self.assertEqual(result.cell, _CELL)
    np.testing.assert_array_equal(result.steps, [0, 2, 4, 6])
    self.assertFalse(np.isnan(result.history.losses).any())
    # Untrained, a class has chance 1/4; the rate is high enough to learn.
    self.assertLess(np.abs(result.history.losses[:, 0] - np.log(4)).max(), 1)
    self.assertLess(
        result.history.losses[:, -1].mean(), result.history.losses[:, 0].mean()
    )
    self.assertLen(rows, 4 * 2)
    last = rows[-1]
    self.assertEqual(
        (last["experiment"], last["cell"], last["seed"], last["step"]),
        ("table1", _CELL.name, 2, 6),
    )
    np.testing.assert_allclose(
        last["last_batch_loss"], result.history.losses[1, 5]
    )
    np.testing.assert_allclose(last["accuracy"], result.history.accuracy[1, 3])
    is_used = result.hierarchies[1].is_used(1)
    np.testing.assert_allclose(
        last["score_1"],
        result.history.scores[1].own[1, 3, is_used].mean(),
        rtol=1e-6,
    )
    for level, num in enumerate((5, 6, 4)):
      for values in result.history.scores[level]:
        self.assertEqual(values.shape, (2, 4, num))
        self.assertFalse(np.isnan(values).any())

  @pytest.mark.slow
  def test_divergence_names_the_cell_the_seed_and_the_rate(self):
    config = dataclasses.replace(_SMALL, lr=1e38)
    with self.assertRaisesRegex(
        errors.UserError, r"N_ch=2.*seed=1, lr=1e\+38: .* smaller lr"
    ):
      train.train_and_evaluate(config, self._workdir())


class MakeCellsTest(absltest.TestCase):

  def test_are_all_combinations_of_the_axes(self):
    cells = train.make_cells(config_lib.table1())
    self.assertLen(set(cells), 12)
    self.assertEqual(cells[0], train.Cell(20, 2, (10, 20)))
    self.assertEqual(cells[1], train.Cell(20, 2, (20, 30)))
    self.assertEqual(cells[-1], train.Cell(50, 3, (20, 30)))
    self.assertEqual(config_lib.table1().num_cells, 12)
    self.assertEqual(config_lib.table1().num_runs, 60)


class MakeRunsTest(absltest.TestCase):

  def test_sequences_and_latents_are_those_of_the_hierarchies(self):
    seeds = np.array([1, 2], np.int32)
    hierarchies = [train.make_hierarchy(_SMALL, _CELL, s) for s in (1, 2)]
    runs = train.make_runs(_SMALL, seeds, hierarchies)
    np.testing.assert_array_equal(runs.seed, seeds)
    # Up to 2 x 2 x 2 of 9 tokens, after one of the 12 - 8 of padding.
    np.testing.assert_array_equal(runs.num_padding, 4)
    self.assertEqual(runs.tokens.shape, (2, 4, 9))
    for r, one in enumerate(hierarchies):
      for k in range(4):
        tokens = [token for token in runs.tokens[r, k] if token < 9]
        self.assertEqual(tokens, np.flatnonzero(one.is_present[k]).tolist())
        np.testing.assert_array_equal(
            runs.latents.activity[1][r, k], one.activity[1][k]
        )
      weights = runs.latents.unseen_weights[r]
      num = np.count_nonzero(weights)
      self.assertBetween(num, 2, 15)  # Fewer pairs than 16 have new tokens.
      np.testing.assert_allclose(weights[:num], 1 / num)
      unseen = data.unseen_classes(int(seeds[r]), one, 16)
      self.assertLen(unseen, num)
      for q in range(num):
        tokens = runs.latents.unseen_tokens[r, q]
        found = sorted(token for token in tokens if token < 9)
        expected = np.flatnonzero(one.tokens_of(unseen[q : q + 1])[0])
        self.assertEqual(found, expected.tolist())
        np.testing.assert_array_equal(
            np.flatnonzero(runs.latents.unseen_activity[1][r, q]), unseen[q]
        )
      self.assertFalse(runs.latents.unseen_activity[2].any())


_KILLED = """
import dataclasses, hashlib, pathlib, sys
import jax
jax.config.update("jax_disable_most_optimizations", True)
from joma.hierarchy import train
from joma.hierarchy import config as table1_config
small = table1_config.Table1Config(
    num_classes=(4,), num_combinations=(2,), num_latents_0=(5,),
    num_latents_1=(6,), num_seeds=2, num_tokens=10, seq_len=12, embed_dim=8,
    hidden_multiple=1, batch_size=8, num_steps=400, log_every=2,
    checkpoint_every=4, num_unseen=16, num_shuffles=2)
(result,) = train.train_and_evaluate(
    small, pathlib.Path(sys.argv[1]),
    on_progress=lambda n: print("step", flush=True))
digest = hashlib.sha256()
for leaf in jax.tree.leaves((result.params, result.history)):
  digest.update(leaf.tobytes())
print("digest", digest.hexdigest())
"""


class KillTest(absltest.TestCase):

  def _run(self, workdir, kill_after=None):
    """Runs until done, or SIGKILLs it after so many reports."""
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, workdir],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=pathlib.Path(__file__).parents[3],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    with process:
      for reports, line in enumerate(process.stdout):
        if line.startswith("digest"):
          return line
        if reports == kill_after:
          process.kill()
          return None
    raise AssertionError(f"It ended early, with status {process.returncode}.")

  @pytest.mark.slow
  def test_kills_leave_the_final_parameters_bitwise(self):
    undisturbed = self._run(self.create_tempdir().full_path)
    workdir, chance = self.create_tempdir().full_path, random.Random(0)
    for _ in range(3):
      self.assertIsNone(self._run(workdir, chance.randint(5, 20)))
    self.assertEqual(self._run(workdir), undisturbed)


_COLLECTIVE = r"(all-(reduce|gather|to-all)|reduce-scatter|collective-permute)"


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class TpuTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_on_eight_tpus_never_talk_and_give_up_their_buffers(self):
    mesh = topology.device_mesh(chips.get_chip("v5e"), 8)
    devices = mesh.devices.ravel().tolist()
    talking = jax.pmap(
        lambda x: jax.lax.psum(x, "d"), axis_name="d", devices=devices
    )
    control = talking.lower(jax.ShapeDtypeStruct((8, 128), np.float32))
    self.assertRegex(control.compile().as_text(), _COLLECTIVE)

    seeds = np.arange(8, dtype=np.int32)
    hierarchies = [train.make_hierarchy(_SMALL, _CELL, int(s)) for s in seeds]
    runs = train.make_runs(_SMALL, seeds, hierarchies)
    layout = ensemble.make_ensemble(8, devices=devices)
    model = train.make_model(_SMALL, _CELL.num_classes)
    one_each = lambda leaf: jax.ShapeDtypeStruct(
        (8, 1, *leaf.shape[1:]), leaf.dtype
    )
    state = jax.eval_shape(
        layout.map(run.init, model=model),
        *(jax.tree.map(one_each, runs), ()),
    )
    advance = layout.map(
        run.train,
        donate=True,
        model=model,
        batch_size=8,
        num_steps=10,
        num_shuffles=2,
    )
    compiled = advance.lower(state, ()).compile()
    self.assertNotRegex(compiled.as_text(), _COLLECTIVE)
    memory = compiled.memory_analysis()
    self.assertEqual(memory.alias_size_in_bytes, memory.argument_size_in_bytes)


if __name__ == "__main__":
  absltest.main()
