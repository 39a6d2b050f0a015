import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import config as config_lib
from joma.transformer.layers import cross_entropy
from joma.transformer.text import batches as batches_lib
from joma.transformer.text import corpus as corpus_lib
from joma.transformer.training import layouts
from joma.transformer.training import lm_config
from joma.transformer.training import lm_probes
from joma.transformer.training import lm_step
from joma.transformer.training import observe
from joma.transformer.training import train
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import metric_stream
from scansnap_jax.experiment.processes import preemption

_SMALL = lm_config.LmConfig(
    model=config_lib.TransformerConfig(
        num_layers=1,
        embed_dim=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        hidden_dim=8,
        dropout=0.1,
    ),
    batch_layout="sequential",
    batch_size=4,
    seq_len=6,
    optimizer="adam",
    weight_decay=0.0,
    lr=0.01,
    num_steps=8,
    log_every=2,
    eval_every=4,
    checkpoint_every=2,
    eval_batch_size=3,
    entropy_chunk=1,
    probes=("sinks", "local", "update_rank"),
    map_steps=(0, 4),
    reset_optimizer_every_epoch=True,
)


def _corpus(num_train=75):
  """The first bytes of the embedded text: 3 steps an epoch, the last short."""
  corpus = corpus_lib.load()
  return dataclasses.replace(
      corpus, train=corpus.train[:num_train], valid=corpus.valid[:50]
  )


def _final(result):
  return result.params, result.history


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

  def test_a_stop_is_continued_bitwise_and_the_end_is_read_back(self):
    corpus, whole = _corpus(), self._workdir()
    undisturbed = train.train_and_evaluate(_SMALL, corpus, whole)
    workdir, steps = self._workdir(), []

    def terminate_after_first_interval(num_steps):
      steps.append(num_steps)
      if sum(steps) == 2:
        os.kill(os.getpid(), signal.SIGTERM)

    with self.assertRaisesRegex(preemption.Stopped, "lm at step 2 of 8"):
      train.train_and_evaluate(
          _SMALL, corpus, workdir, on_progress=terminate_after_first_interval
      )
    resumed = train.train_and_evaluate(_SMALL, corpus, workdir)
    chex.assert_trees_all_equal(_final(resumed), _final(undisturbed))

    def read(folder):
      rows = metric_stream.read_rows(folder / "metrics.jsonl")
      for row in rows:
        row.pop("tokens_per_sec", None)
      return rows

    rows = read(workdir)
    self.assertEqual(rows, read(whole))
    self._check_rows(rows, undisturbed, corpus)

  @pytest.mark.slow
  def test_the_last_map_is_that_which_would_be_recorded(self):
    late = dataclasses.replace(_SMALL, map_steps=(0, 8))
    asked = train.train_and_evaluate(late, _corpus(), self._workdir())
    result = train.train_and_evaluate(_SMALL, _corpus(), self._workdir())
    self.assertIsNone(asked.last_map)
    np.testing.assert_array_equal(asked.maps()[1][-1], result.maps()[1][-1])
    self.assertEqual(asked.maps()[0], (0, 8))
    none = dataclasses.replace(_SMALL, map_steps=())
    none = train.train_and_evaluate(none, _corpus(), self._workdir())
    self.assertEqual((none.maps()[0], len(none.maps()[1])), ((), 0))

  def _check_rows(self, rows, result, corpus):
    history = result.history
    self.assertEqual([row["step"] for row in rows], [0, 2, 4, 6, 8])
    np.testing.assert_array_equal(result.steps, [0, 2, 4, 6, 8])
    self.assertFalse(np.isnan(history.losses).any())
    self.assertFalse(np.isnan(history.entropy).any())
    self.assertNotIn("train_loss", rows[0])
    self.assertNotIn("last_batch_loss", rows[0])
    for row in rows[1:]:
      np.testing.assert_allclose(
          row["last_batch_loss"], history.losses[row["step"] - 1]
      )
    np.testing.assert_allclose(
        rows[2]["train_loss"], history.losses[2:4].mean(), rtol=1e-6
    )
    measured = ~np.isnan(history.valid_loss)
    np.testing.assert_array_equal(measured, [True, False, True, False, True])
    self.assertEqual(["valid_loss" in row for row in rows], measured.tolist())
    np.testing.assert_allclose(
        rows[4]["entropy/layer_0"], history.entropy[4, 0]
    )
    for name in ("sinks", "local_0", "update_rank_mlp_up"):
      self.assertEqual(
          [row[f"{name}/layer_0"] for row in rows],
          history.named[name][:, 0].tolist(),
      )
    # Nothing has changed before the first step, and something after it.
    self.assertEqual(history.named["update_rank_mlp_up"][0, 0], 0)
    self.assertGreater(history.named["update_rank_mlp_up"][1, 0], 0)
    self.assertEqual(history.attn_maps.shape, (2, 1, 1, 6, 6))
    np.testing.assert_allclose(history.attn_maps.sum(-1), 1, rtol=1e-5)
    steps, maps = result.maps()  # That of the trained model is among them.
    self.assertEqual(steps, (0, 4, 8))
    np.testing.assert_array_equal(maps[:2], history.attn_maps)
    task = lm_step.make_task(_SMALL, 8, 3)
    columns = jnp.int32(corpus.valid[:48].reshape(3, 16))
    # One sequence is the second six tokens of the first column.
    chunk = batches_lib.Batch(columns[None, :1, 6:12], None, None)
    params = jax.tree.map(jnp.asarray, result.params)
    attn_weights = lm_probes.attn_maps(params, chunk, task=task)[0, 0]
    plogp = attn_weights * jnp.log(jnp.maximum(attn_weights, 1e-30))
    np.testing.assert_allclose(
        rows[4]["chunk_entropy/layer_0"], -plogp.sum(-1).mean(), rtol=1e-5
    )
    self.assertEqual(
        rows[4]["chunk_entropy/layer_0"], history.chunk_entropy[4, 0]
    )
    # The rows' loss is that of the text read in one piece per row of columns.
    apply, losses = jax.jit(task.model.apply), []
    for start in range(0, 15, 6):
      piece = columns[:, start : start + 7]
      logits = apply({"params": result.params}, piece[:, :-1])
      losses.append(cross_entropy.token_losses(logits, piece[:, 1:]))
    np.testing.assert_allclose(
        rows[4]["valid_loss"],
        np.concatenate(losses, axis=1).mean(),
        rtol=1e-5,
    )

  @pytest.mark.slow
  def test_divergence_names_rate_and_seed(self):
    config = dataclasses.replace(
        _SMALL,
        optimizer="sgd",
        clip_norm=None,
        lr=1e38,
        checkpoint_every=8,
    )
    # At the next evaluation, before a checkpoint is due.
    with self.assertRaisesRegex(
        errors.UserError,
        r"lm diverged between steps 0 and 2, with lr=1e\+38, seed=1: .* lr",
    ):
      train.train_and_evaluate(config, _corpus(), self._workdir())

  @pytest.mark.slow
  def test_a_layer_without_weights_has_no_probes_and_trains(self):
    model = dataclasses.replace(
        _SMALL.model, num_layers=2, attention=("lightning", "softmax")
    )
    names = ("sinks", "diversity", "local")
    config = dataclasses.replace(
        _SMALL, model=model, num_steps=2, probes=names, map_steps=(0,)
    )
    with jax.debug_nans(True):  # On a device a NaN is a fault.
      result = train.train_and_evaluate(config, _corpus(), self._workdir())
    history = result.history
    self.assertLen(history.named, 6)
    for seen in (
        *(history.entropy, history.effective_support, history.sink_rate),
        *(history.attn_maps, *history.named.values()),
    ):
      self.assertTrue(np.isnan(seen[:, 0]).all())
      self.assertTrue(np.isfinite(seen[:, 1]).all())
    self.assertTrue(np.isfinite(history.stable_rank).all())

  def test_what_a_layer_without_weights_lacks_is_no_divergence(self):
    model = dataclasses.replace(
        _SMALL.model, num_layers=2, attention=("lightning", "softmax")
    )
    values = np.array([np.nan, 1.0], np.float32)
    loss = np.float32(2.0)
    seen = observe.Observation(
        lm_probes.Probes(values, values, values, values), values, loss, None
    )
    self.assertTrue(layouts.is_finite(train._with_weights(seen, model)))
    plain = dataclasses.replace(model, attention=())
    self.assertFalse(layouts.is_finite(train._with_weights(seen, plain)))

  def test_a_vocabulary_that_the_model_lacks_is_refused(self):
    model = dataclasses.replace(_SMALL.model, vocab_size=255)
    config = dataclasses.replace(_SMALL, model=model)
    with self.assertRaisesRegex(
        errors.UserError, "vocab_size=255 is less than the 256 .* give it 256"
    ):
      train.train_and_evaluate(config, _corpus(), self._workdir())


class BatchesTest(absltest.TestCase):

  def test_length_in_epochs_counts_the_short_batch(self):
    config = dataclasses.replace(_SMALL, num_steps=None, num_epochs=4)
    text = train.make_batches(config, _corpus())
    self.assertIsInstance(text, batches_lib.SequentialBatches)
    self.assertEqual(train.num_steps(config, text.steps_per_epoch), 4 * 3)
    self.assertLess(text.batch(1, 2).weights.sum(), 4 * 6)

  def test_validation_has_every_token_once_however_many_rows(self):
    corpus = _corpus()
    for num_rows in (1, 4):
      batches = observe.valid_batches(_SMALL, corpus, num_rows)
      self.assertEqual(batches.inputs.shape[1:], (num_rows, 6))
      is_real = batches.weights == 1
      self.assertEqual(is_real.sum(), 3 * 15)
      found = np.sort(batches.targets[is_real])
      expected = corpus.valid[:48].reshape(3, 16)[:, 1:]
      np.testing.assert_array_equal(found, np.sort(expected.ravel()))


_KILLED = """
import dataclasses, hashlib, pathlib, sys
import jax
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from joma.transformer import config
from joma.transformer.text import corpus
from joma.transformer.training import lm_config, train
model = config.TransformerConfig(
    num_layers=1, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=8,
    hidden_dim=8, dropout=.1)
small = lm_config.LmConfig(
    model=model, batch_layout="random", batch_size=4, seq_len=6, lr=.01,
    num_steps=int(sys.argv[3]), log_every=2, eval_every=1000,
    checkpoint_every=4, map_steps=())
text = corpus.load()
text = dataclasses.replace(text, valid=text.valid[:200])
result = train.train_and_evaluate(
    small, text, pathlib.Path(sys.argv[1]),
    on_progress=lambda n: print("steps", n, flush=True))
digest = hashlib.sha256()
for leaf in jax.tree.leaves((result.params, result.history)):
  digest.update(leaf.tobytes())
print("digest", digest.hexdigest())
"""


class KillTest(absltest.TestCase):

  def _run(self, workdir, cache, num_steps, kill_after=None, delay=0.0):
    """Runs until done, or SIGKILLs it `delay` s after so many reports."""
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, workdir, cache, str(num_steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=pathlib.Path(__file__).parents[4],
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
    raise AssertionError(f"It ended early, with status {process.returncode}.")

  def _check(self, num_kills, num_steps):
    cache = self.create_tempdir().full_path
    whole = self.create_tempdir().full_path
    undisturbed = self._run(whole, cache, num_steps)
    workdir, chance = self.create_tempdir().full_path, random.Random(0)
    for _ in range(num_kills):
      # Relative to progress; the delay lets kills fall into saves too.
      when = chance.randint(2, 8), 0.05 * chance.random()
      self.assertIsNone(self._run(workdir, cache, num_steps, *when))
    # The losses are in the digest: each batch was the one of its step.
    self.assertEqual(self._run(workdir, cache, num_steps), undisturbed)
    rows = metric_stream.read_rows(pathlib.Path(workdir) / "metrics.jsonl")
    self.assertEqual(
        [row["step"] for row in rows], list(range(0, num_steps + 1, 2))
    )

  @pytest.mark.slow
  def test_kills_leave_losses_and_parameters_bitwise(self):
    self._check(num_kills=2, num_steps=100)

  @pytest.mark.slow
  def test_ten_kills_leave_losses_and_parameters_bitwise(self):
    self._check(num_kills=10, num_steps=400)


if __name__ == "__main__":
  absltest.main()
