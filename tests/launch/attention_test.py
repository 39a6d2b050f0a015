import ast
import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
import pytest

from tests.faults import scripts
from tests.joma.studies.systems import small as small_systems
from tests.joma.studies.theories import small as small_theories

_ROOT = pathlib.Path(__file__).parents[2]
(_SCRIPT,) = (s for s in scripts.find() if s.module == "launch.attention")


def _run(*args):
  return subprocess.run(
      [sys.executable, "-m", "launch.attention", *args],
      capture_output=True,
      text=True,
      cwd=_ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      check=True,
  )


class AttentionTest(absltest.TestCase):

  def test_every_study_has_its_small_one(self):
    tree = ast.parse((_ROOT / "launch/attention.py").read_text())
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and "_STUDIES" in ast.unparse(node)
        if isinstance(node.value, ast.Dict)
    )
    modules = [value.value.id for value in table.values]
    smalls = [*small_systems.STUDIES, *small_theories.STUDIES]
    self.assertCountEqual(modules, smalls)

  @pytest.mark.slow
  def test_a_study_is_reported_and_goes_on_from_its_parts(self):
    workdir = pathlib.Path(self.create_tempdir().full_path) / "new"
    first = _run(*_SCRIPT.argv, f"--workdir={workdir}")
    summary = json.loads((workdir / "summary.json").read_text())
    self.assertIn(summary["positional"]["finding"], first.stdout)
    report = (workdir / "report.html").read_text()
    self.assertIn("FAILED", report)
    self.assertIn("Attention systems", report)
    times = lambda: {
        path: path.stat().st_mtime_ns for path in (workdir / "parts").iterdir()
    }
    before = times()
    self.assertLen(before, 2)
    again = _run(*_SCRIPT.argv, f"--workdir={workdir}")
    self.assertIn(summary["positional"]["finding"], again.stdout)
    self.assertEqual(times(), before)


if __name__ == "__main__":
  absltest.main()
