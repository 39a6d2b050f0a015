"""`launch.evaluate_cache` as its own process."""

import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
import pytest

_ROOT = pathlib.Path(__file__).parent.parent.parent
_TINY = (
    "--train_steps=2",
    "--train_batch=4",
    "--batch_size=2",
    "--num_seeds=3",
    "--length=16",
    "--num_pairs=2",
    "--vocab_size=12",
    "--budgets=0.25,0.5",
    "--policies=h2o,streaming_llm:num_sinks=1",
)


def _run(*arguments):
  # Compilation is most of it, and what is compiled hardly runs.
  env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_backend_optimization_level=0",
  }
  return subprocess.run(
      [sys.executable, "-m", "launch.evaluate_cache", *arguments],
      capture_output=True,
      text=True,
      cwd=_ROOT,
      check=False,
      env=env,
  )


class EvaluateCacheTest(absltest.TestCase):

  def test_flags_do_not_wait_for_jax(self):
    code = (
        "import sys; from launch import evaluate_cache;"
        " assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=_ROOT)

  @pytest.mark.slow
  def test_a_policy_that_is_none_costs_no_training(self):
    workdir = pathlib.Path(self.create_tempdir().full_path) / "new"
    result = _run(f"--workdir={workdir}", "--policies=h3o")
    self.assertEqual(result.returncode, 2)
    self.assertIn("error: policy='h3o' is unknown; there are", result.stderr)
    self.assertFalse(workdir.exists())

  @pytest.mark.slow  # A dozen compilations.
  def test_trains_reads_and_reports(self):
    workdir = pathlib.Path(self.create_tempdir().full_path) / "new"
    result = _run(f"--workdir={workdir}", *_TINY)
    self.assertEqual(result.returncode, 0, result.stderr)
    summary = json.loads((workdir / "summary.json").read_text())
    self.assertIn(summary["finding"][0], result.stdout)
    rows = summary["tasks"]["mqar"]
    self.assertLen(rows, 1 + 4 * 2)
    for row in rows:
      self.assertEqual(row["num_texts"], 6)
      # Random eviction is another program for each draw.
      expected = 3 if row["policy"] == "random" else 1
      self.assertEqual(row["compilations"], expected)
    report = (workdir / "report.html").read_text()
    self.assertEqual(report.count("data:image/png;base64"), 1)


if __name__ == "__main__":
  absltest.main()
