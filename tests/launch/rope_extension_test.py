"""Smoke test of `launch.rope_extension`, as its own process."""

import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
import numpy as np
import pytest

_ROOT = pathlib.Path(__file__).parent.parent.parent
_TINY = (
    "--window=4",
    "--factor=2",
    "--bin_size=2",
    "--num_layers=1",
    "--embed_dim=32",
    "--num_steps=3",
    "--tuning_steps=2",
    "--batch_size=2",
    "--num_texts=5",
)


class RopeExtensionTest(absltest.TestCase):

  def test_flags_do_not_wait_for_jax(self):
    code = (
        "import sys; from launch import rope_extension;"
        " assert not {'jax', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=_ROOT)

  @pytest.mark.slow  # A dozen compilations.
  def test_every_kind_is_read_and_drawn(self):
    workdir = pathlib.Path(self.create_tempdir().full_path) / "new"
    command = [sys.executable, "-m", "launch.rope_extension"]
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
    self.assertEqual(summary["positions"], [1.5, 3.5, 5.5, 7.5])
    names = ("plain", "linear", "ntk", "yarn", "plain_tuned", "linear_tuned")
    self.assertCountEqual(summary["curves"], names)
    losses = [tuple(summary["curves"][name]["loss"]) for name in names]
    self.assertLen(set(losses), len(names))
    # Bytes of an untrained model: near ln 256 nats each.
    self.assertBetween(np.mean(losses), 4, 7)
    report = (workdir / "report.html").read_text()
    self.assertEqual(report.count("data:image/png;base64"), 1)


if __name__ == "__main__":
  absltest.main()
