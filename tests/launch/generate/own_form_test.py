"""A system with parameters from training to every script that reads models."""

import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
import numpy as np
import pytest

from tests.launch import generate_test

_ROOT = pathlib.Path(__file__).parents[3]
_TINY = (
    "--model.attention=ssa+key_bias,softmax",
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


class OwnFormTest(absltest.TestCase):

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

  @pytest.mark.slow
  def test_trained_saved_and_read_by_every_script(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    text = root / "text.txt"
    text.write_text("to be or not to be\n" * 99)
    self._run("train_lm", f"--workdir={root}/run", f"--corpus={text}", *_TINY)
    model = root / "run" / "own" / "step2"
    fields = json.loads((model / "config.json").read_text())
    self.assertEqual(fields["model_type"], "joma")
    read = f"--model={model}"
    told = self._run("generate", read, "--prompt=to be", "--max_new_tokens=3")
    self.assertTrue(told.startswith("to be"), told)
    policy = ("--policy=h2o", "--capacity=64")
    bounded = self._run(
        "generate", read, "--prompt=to be", "--max_new_tokens=3", *policy
    )
    self.assertEqual(bounded, told)
    short = root / "short.txt"
    short.write_text("to be or not to be, that is the question" * 2)
    self._run("inspect_lm", read, f"--text={short}", f"--workdir={root}/seen")
    seen = json.loads((root / "seen" / "summary.json").read_text())
    entropy = np.array(seen["models"][0]["entropy"])
    self.assertEqual(entropy.shape, (2, 2))
    self.assertTrue(np.isfinite(entropy).all())
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
