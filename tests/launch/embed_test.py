import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
import numpy as np
import pytest

from tests.joma.transformer.checkpoints import measure_test

_ROOT = pathlib.Path(__file__).parents[2]


def _run(*args):
  return subprocess.run(
      [sys.executable, "-m", "launch.embed", *args],
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      cwd=_ROOT,
      capture_output=True,
      text=True,
      check=False,
  )


class EmbedTest(absltest.TestCase):

  @pytest.mark.slow
  def test_lines_become_vectors_and_nothing_is_written_over(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    measure_test.save_model(root / "model")
    (root / "lines.txt").write_bytes(b"to be\r\nor not\n")
    flags = (
        *(f"--model={root}/model", f"--text={root}/lines.txt"),
        f"--out={root}/new/in/found.npz",
    )
    done = _run(*flags)
    self.assertEqual(done.returncode, 0, done.stderr)
    found = np.load(root / "new" / "in" / "found.npz")["embeddings"]
    self.assertEqual(found.shape, (2, 8))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    again = _run(*flags)
    self.assertEqual(again.returncode, 2)
    self.assertRegex(again.stderr, "^error: --out=.* is there: [^\n]*\n$")

  def test_wrong_flags_do_not_wait_for_jax(self):
    for flag, message in (
        ("--out=a.txt", "--out=a.txt must end in .npz"),
        ("--out=/dev/null/a.npz", "/dev/null is no folder"),
        ("--text=absent", "--text: absent cannot be read"),
    ):
      done = _run("--model=unused", "--text=also_unused", flag)
      self.assertEqual(done.returncode, 2)
      self.assertRegex(done.stderr, f"^error: .*{message}[^\n]*\n$")


if __name__ == "__main__":
  absltest.main()
