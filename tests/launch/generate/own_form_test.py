"""A system with parameters from training to every script that reads models."""

import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from tests.launch import generate_test

_ROOT = pathlib.Path(__file__).parents[3]
_TINY = (
    "--model.num_layers=2",
    "--model.embed_dim=8",
    "--model.num_heads=2",
    "--model.num_kv_heads=1",
    "--model.head_dim=8",
    "--model.hidden_dim=8",
    "--model.max_len=64",
    "--batch_size=2",
    "--seq_len=8",
    "--num_steps=2",
    "--log_every=1",
    "--eval_every=2",
    "--map_steps=2",
    "--save_own",
)


# Rules of weights and what is prepared; states; routes and chunks; selection.
# Whether each of the two layers has weights to look at.
_HAVE_WEIGHTS = {
    "ssa+key_bias,softmax": [True, True],
    "titans:chunk=4,gdn+gated_attention": [False, False],
    "nats:chunk=4,moh:shared=0:active=1": [False, True],
    "indexer:k=4,landmark:block=4": [True, True],
}


class OwnFormTest(parameterized.TestCase):

  def _run(self, script, *arguments):
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{script}", *arguments],
        env=env,
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    return done.stdout

  @parameterized.parameters(*_HAVE_WEIGHTS)
  @pytest.mark.slow
  def test_trained_saved_and_read_by_every_script(self, attention):
    root = pathlib.Path(self.create_tempdir().full_path)
    text = root / "text.txt"
    text.write_text("to be or not to be\n" * 99)
    given = (f"--corpus={text}", f"--model.attention={attention}", *_TINY)
    self._run("train_lm", f"--workdir={root}/run", *given)
    model = root / "run" / "own" / "step2"
    fields = json.loads((model / "config.json").read_text())
    self.assertEqual(fields["model_type"], "joma")
    self.assertEqual(fields["attention"], attention.split(","))
    read = f"--model={model}"
    told = self._run("generate", read, "--prompt=to be", "--max_new_tokens=3")
    self.assertTrue(told.startswith("to be"), told)
    if "softmax" in attention:  # There h2o has keys to evict from.
      policy = ("--policy=h2o", "--capacity=64")
      bounded = self._run(
          "generate", read, "--prompt=to be", "--max_new_tokens=3", *policy
      )
      self.assertEqual(bounded, told)
    short = root / "short.txt"
    short.write_text("to be or not to be, that is the question" * 2)
    self._run("inspect_lm", read, f"--text={short}", f"--workdir={root}/seen")
    seen = json.loads((root / "seen" / "summary.json").read_text())
    # Of layers that have weights; states and own caches have none.
    entropy = np.array(seen["models"][0]["entropy"], float)
    self.assertEqual(entropy.shape, (2, 2))
    self.assertEqual(
        np.isfinite(entropy).all(axis=1).tolist(), _HAVE_WEIGHTS[attention]
    )
    self._run(
        "evaluate_cache",
        read,
        f"--workdir={root}/caches",
        "--tasks=perplexity",
        "--policies=full",
        "--length=16",
        "--batch_size=2",
        "--num_seeds=1",
    )
    rows = json.loads((root / "caches" / "summary.json").read_text())
    self.assertEqual(rows["tasks"]["perplexity"][0]["policy"], "full")

  @pytest.mark.slow
  def test_systems_without_parameters_over_any_checkpoint(self):
    """Those that read everything change nothing; one that reads less does."""
    root = pathlib.Path(self.create_tempdir().full_path)
    generate_test.save_model(root / "model")
    text = root / "text.txt"
    text.write_text("to be or not to be, that is the question" * 2)
    read = f"--model={root}/model"

    def losses(*attention):
      told = self._run(
          "generate", read, "--prompt=to be or", "--max_new_tokens=8",
          *attention,
      )  # fmt: skip
      workdir = root / f"seen_{len(list(root.iterdir()))}"
      given = (read, f"--text={text}", f"--workdir={workdir}", *attention)
      self._run("inspect_lm", *given)
      seen = json.loads((workdir / "summary.json").read_text())
      return told, seen["models"][0]["loss"]

    plain, loss = losses()
    for entry in ("moba:k=64:block=4", "act:beta=1"):
      told, other = losses(f"--attention={entry}")
      self.assertEqual(told, plain)
      self.assertAlmostEqual(other, loss, delta=1e-6)
    _, other = losses("--attention=moba:k=1:block=2")
    self.assertGreater(abs(other - loss), 1e-6)


if __name__ == "__main__":
  absltest.main()
