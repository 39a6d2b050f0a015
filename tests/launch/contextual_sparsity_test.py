"""Smoke test of `launch.contextual_sparsity`, as its own process."""

import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
import pytest

_ROOT = pathlib.Path(__file__).parent.parent.parent
_TINY = (
    "--num_layers=1",
    "--embed_dim=32",
    "--hidden_dim=16",
    "--num_steps=3",
    "--batch_size=2",
    "--seq_len=8",
    "--num_texts=8",
    "--num_eval_texts=4",
    "--eval_batch_size=2",
    "--capture.block_size=2",
    "--capture.batch_size=4",
    "--predictor.rank=4",
    "--predictor.num_steps=4",
    "--shares=0.5,1.0",
    "--head_shares=1.0",
    "--recalls=0.9",
    "--methods=teal:layers,int8",
    "--budgets=0.5",
)


class ContextualSparsityTest(absltest.TestCase):

  def test_flags_do_not_wait_for_jax(self):
    code = (
        "import sys; from launch import contextual_sparsity;"
        " assert not {'jax', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=_ROOT)

  @pytest.mark.slow  # A dozen compilations.
  def test_every_rule_is_measured_and_drawn_and_all_is_dense(self):
    workdir = pathlib.Path(self.create_tempdir().full_path) / "new"
    command = [sys.executable, "-m", "launch.contextual_sparsity"]
    command += [*_TINY, f"--workdir={workdir}"]
    # Compilation is most of it, and what is compiled hardly runs.
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=_ROOT,
        check=False,
        env=env,
    )
    self.assertEqual(result.returncode, 0, result.stderr)
    summary = json.loads((workdir / "summary.json").read_text())
    self.assertIn(summary["finding"], result.stdout)
    rules = {row["rule"] for row in summary["rows"]}
    self.assertLen(rules, 7 + 4)
    whole = [row for row in summary["rows"] if row["share"] == 1]
    self.assertLen(whole, 6 + 4)
    for row in whole:
      self.assertAlmostEqual(row["change"], 0, places=6, msg=row["rule"])
    half = [row for row in summary["rows"] if row["share"] == 0.5]
    for row in half:
      self.assertNotEqual(row["change"], 0, msg=row["rule"])
    report = (workdir / "report.html").read_text()
    self.assertEqual(report.count("data:image/png;base64"), 3)
    methods = [(row["rule"], row["share"]) for row in summary["methods"]]
    self.assertEqual(methods, [("teal:layers", 0.5), ("int8", 1.0)])
    lines = (workdir / "rows.jsonl").read_text().splitlines()
    self.assertLen(lines, 3)  # The dense model's too.
    self.assertTrue((workdir / "predictors.npz").is_file())
    self.assertTrue((workdir / "capture" / "manifest.json").is_file())


if __name__ == "__main__":
  absltest.main()
