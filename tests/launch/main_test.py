"""Tests of the one command over all scripts, as a shell starts it."""

import os
import pathlib
import re
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized

from launch import __main__ as command

_ROOT = pathlib.Path(__file__).parents[2]
# As the console script that an installation writes, which is no `python -m`.
_START = "from launch.__main__ import main; main()"


class MainTest(parameterized.TestCase):

  def _run(self, *args):
    # In a folder with a launch.py of its own, which must not be found.
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / "launch.py").write_text("raise SystemExit(77)\n")
    start = f"import sys; sys.path[0] = {str(_ROOT)!r}; {_START}"
    return subprocess.run(
        [sys.executable, "-c", start, *args],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )

  def test_every_script_is_listed_with_what_it_does(self):
    done = self._run()
    self.assertEqual(done.returncode, 0, done.stderr)
    for name in ("train_lm", "plan", "evaluate_cache", "attention"):
      self.assertRegex(done.stdout, rf"(?m)^  {name} +\S.*\.$")
    self.assertNotIn("__init__", done.stdout)
    listed = re.findall(r"(?m)^  (\S+)", done.stdout)
    former = ["bench_attention", "bench_kernels"]
    self.assertCountEqual(listed + former, command.scripts())

  def test_a_script_gets_its_flags(self):
    done = self._run("cost_table", "--help")
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertStartsWith(done.stdout, "Prints what a decode step")
    done = self._run("cost_table", "--batches=1")
    self.assertEqual(done.returncode, 2)
    self.assertIn("error: unknown flag --batches; did you mean", done.stderr)

  @parameterized.parameters(
      ("trainlm", "did you mean train_lm"), ("x[/]", "scansnap lists them")
  )
  def test_an_unknown_script_is_one_line(self, name, told):
    done = self._run(name, "--workdir=x")
    self.assertEqual(done.returncode, 2)
    self.assertEqual(done.stderr.count("\n"), 1)
    self.assertIn(f"error: {name!r} is no script; {told}", done.stderr)


if __name__ == "__main__":
  absltest.main()
