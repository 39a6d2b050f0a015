"""Smoke test of `launch.inspect_lm`, as its own process."""

import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
import numpy as np
import pytest

from tests.joma.transformer.checkpoints import measure_test

_ROOT = pathlib.Path(__file__).parent.parent.parent


def _run(*args):
  return subprocess.run(
      [sys.executable, "-m", "launch.inspect_lm", *args],
      capture_output=True,
      text=True,
      cwd=_ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      check=False,
  )


class InspectLmTest(absltest.TestCase):

  @pytest.mark.slow
  def test_two_models_read_a_text(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    for seed in (0, 1):
      measure_test.save_model(root / f"step{seed}", seed)
    (root / "text.txt").write_text("To be, or not to be")
    result = _run(
        f"--model={root}/step*",
        f"--text={root}/text.txt",
        f"--workdir={root}/run",
        "--explore",
    )
    self.assertEqual(result.returncode, 0, result.stderr)
    self.assertIn("19 tokens are cut into windows of 8", result.stderr)
    summary = json.loads((root / "run" / "summary.json").read_text())
    self.assertIn(summary["finding"], result.stdout)
    first, second = summary["models"]
    self.assertEqual((first["name"], second["name"]), ("step0", "step1"))
    self.assertEqual(np.shape(first["entropy"]), (1, 2))
    self.assertNotEqual(first["loss"], second["loss"])
    report = (root / "run" / "report.html").read_text()
    self.assertIn('<a href="explore.html">explore.html</a>', report)
    page = (root / "run" / "explore.html").read_text()
    self.assertIn('"pieces": ["T", "o", " ", "b", "e", ",", " ", "o"]', page)

  def test_logits_alone_need_no_workdir(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    measure_test.save_model(root / "model", 0)
    np.savez(root / "ids.npz", ids=np.array([[1, 2, 3], [4, 5, 6]]))
    result = _run(
        f"--model={root}/model",
        f"--ids={root}/ids.npz",
        f"--logits_out={root}/logits.npy",
    )
    self.assertEqual(result.returncode, 0, result.stderr)
    logits = np.load(root / "logits.npy")
    self.assertEqual((logits.shape[:2], logits.dtype), ((2, 3), np.float32))
    self.assertEqual(
        sorted(path.name for path in root.iterdir()),
        ["ids.npz", "logits.npy", "model"],
    )

  def test_bad_input_is_one_line(self):
    result = _run("--model=absent", "--ids=x.npz", "--workdir=unused")
    self.assertEqual(result.returncode, 2)
    self.assertRegex(
        result.stderr, "^error: There is no folder absent[^\n]*\n$"
    )

  def test_a_page_wants_a_folder(self):
    result = _run("--model=absent", "--ids=x.npz", "--explore")
    self.assertEqual(result.returncode, 2)
    self.assertEqual(
        result.stderr, "error: --explore writes into --workdir=DIR: give one.\n"
    )

  def test_flags_do_not_wait_for_jax(self):
    code = (
        "import sys; from launch import inspect_lm;"
        " assert not {'jax', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=_ROOT)


if __name__ == "__main__":
  absltest.main()
