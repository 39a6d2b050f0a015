import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
import pytest

from tests.joma.transformer.checkpoints import measure_test

_ROOT = pathlib.Path(__file__).parents[3]


def _run(*args):
  return subprocess.run(
      [sys.executable, "-m", "launch.explore", *args],
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      cwd=_ROOT,
      capture_output=True,
      text=True,
      check=False,
  )


class ExploreTest(absltest.TestCase):

  @pytest.mark.slow
  def test_a_prompt_becomes_a_page_and_nothing_is_written_over(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    measure_test.save_model(root / "model")
    (root / "text.txt").write_text("to be")
    flags = (
        *(f"--model={root}/model", f"--out={root}/page.html"),
        *("--max_new_tokens=2", "--slots=3", "--policies=h2o,window"),
    )
    done = _run(*flags, f"--text={root}/text.txt")
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertRegex(done.stdout, "^With 3 slots H2O keeps .*; with all keys")
    page = (root / "page.html").read_text()
    self.assertIn("What model attends to, and what H2O and window keep", page)
    for more, message in (
        (["--prompt=to be"], "--out=.* is there"),
        (["--prompt=", f"--out={root}/a.html"], "the text '' has no token"),
        (
            [
                "--prompt=to be or not",
                f"--out={root}/a.html",
                "--policies=h2o:num_recent=3",
            ],
            "policies=h2o:num_recent=3, 3 slots: ",
        ),
    ):
      again = _run(*flags, *more)
      self.assertEqual(again.returncode, 2)
      self.assertRegex(again.stderr, f"^error: {message}[^\n]*\n$")

  def test_wrong_flags_do_not_wait_for_jax(self):
    for flags, message in (
        (["--prompt=a", "--out=a.txt"], "--out=a.txt must end in .html"),
        (
            ["--prompt=a", "--out=/dev/null/a.html"],
            "--out=.* /dev/null is no folder",
        ),
        (["--prompt=a", "--policies=h3o"], "policy='h3o' is unknown"),
        (["--prompt=a", "--text=b"], "give one of --prompt=TEXT and --text"),
    ):
      done = _run("--model=unused", *flags)
      self.assertEqual(done.returncode, 2)
      self.assertRegex(done.stderr, f"^error: .*{message}[^\n]*\n$")


if __name__ == "__main__":
  absltest.main()
