import json
import os
import pathlib
import re
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import pytest

_ROOT = pathlib.Path(__file__).parent.parent.parent
_TINY_TABLE = (
    "--preset=table1_reduced",
    "--table1.num_classes=5",
    "--table1.num_combinations=2",
    "--table1.num_latents_0=6",
    "--table1.num_latents_1=7",
    "--table1.num_tokens=20",
    "--table1.seq_len=9",
    "--table1.embed_dim=8",
    "--table1.num_seeds=2",
    "--table1.num_steps=4",
    "--table1.log_every=2",
    "--table1.num_unseen=5",
    "--table1.num_shuffles=2",
    "--num_cpu_devices=2",
)


def _run(*args, check=True):
  result = subprocess.run(
      [sys.executable, "-m", "launch.joma", *args],
      capture_output=True,
      text=True,
      cwd=_ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      check=False,
  )
  if check and result.returncode:
    raise AssertionError(result.stderr)
  return result


class JomaTest(parameterized.TestCase):

  def test_help_imports_nothing_heavy(self):
    code = (
        "import sys; from launch import joma;"
        " assert not {'jax', 'jaxtyping', 'matplotlib', 'numpy'}"
        " & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=_ROOT)
    result = _run("--help", check=False)
    self.assertIn("--figure4.step_size: Step size eta", result.stdout)

  @pytest.mark.slow
  def test_a_run_that_is_done_is_drawn_for_a_paper(self):
    workdir = pathlib.Path(self.create_tempdir().full_path)
    flags = (f"--workdir={workdir}", "--preset=erf")
    widths = []
    for more in ((), ("--figure_style=icml",)):
      _run(*flags, *more)
      png = (workdir / "figures" / "erf.png").read_bytes()
      widths.append(int.from_bytes(png[16:20], "big") / 300)
    self.assertEqual(widths, [6.9, 6.75])
    flagfile = (workdir / "flags.txt").read_text()
    self.assertNotIn("figure_style", flagfile)

  def test_default_writes_everything(self):
    self._run_default(pathlib.Path(self.create_tempdir().full_path))

  @pytest.mark.slow
  def test_a_flagfile_replays_a_run(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    first, second = folder / "first", folder / "second"
    self._run_default(first)
    _run(f"--flagfile={first}/flags.txt", f"--workdir={second}")
    self.assertEqual(
        (second / "summary.json").read_text(),
        (first / "summary.json").read_text(),
    )

  def _run_default(self, first):
    result = _run(f"--workdir={first}")
    # A slow machine says that it is at work, and no more is said.
    self.assertRegex(result.stderr, r"^(working, \d+ s so far\n)*$")
    summary = json.loads((first / "summary.json").read_text())["figure4"]
    self.assertAlmostEqual(summary["min_entropy"], 0.94157, delta=5e-6)
    self.assertAlmostEqual(summary["min_step"], 669, delta=1)
    self.assertIn(summary["finding"], result.stdout)
    report = (first / "report.html").read_text()
    self.assertLen(re.findall("data:image/png;base64", report), 1)
    for name in ("metrics.jsonl", "config.json", "figures/figure4.pdf"):
      self.assertTrue((first / name).exists(), name)

  @pytest.mark.slow
  def test_table_is_trained_drawn_and_continued(self):
    workdir = pathlib.Path(self.create_tempdir().full_path) / "new"
    _run(*_TINY_TABLE, f"--workdir={workdir}")
    summary = (workdir / "summary.json").read_text()
    (cell,) = json.loads(summary)["table1"]["cells"]
    self.assertEqual(cell["num_classes"], 5)
    for level in cell["levels"][:2]:
      self.assertContainsSubset(
          ("trained", "untrained", "shuffled", "unseen"), level
      )
    (checkpoints,) = (workdir / "checkpoints" / "table1").iterdir()
    written = {p: p.stat().st_mtime_ns for p in checkpoints.rglob("*")}
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    self.assertLen(rows, 2 * 3)  # Two seeds; steps 0, 2, 4.
    _run(*_TINY_TABLE, f"--workdir={workdir}")  # Nothing is left to train.
    self.assertEqual((workdir / "summary.json").read_text(), summary)
    resumes = checkpoints / "resumes.jsonl"
    self.assertEqual(json.loads(resumes.read_text())["step"], 4)
    resumes.unlink()
    self.assertEqual(
        {p: p.stat().st_mtime_ns for p in checkpoints.rglob("*")}, written
    )

  @parameterized.named_parameters(
      ("unknown", ["--figure4.num_step=3"], "did you mean --figure4.num_steps"),
      ("preset", ["--preset=figure6"], "figure6"),
      ("value", ["--figure4.step_size=-1"], "step_size.*-1"),
      ("other_study", ["--erf.delta=1,2"], "runs figure4.*no effect"),
      ("no_workdir", None, "workdir"),
      (
          "pairs",
          ["--preset=table1", "--table1.num_latents_0=9"],
          "as many of one as of the other",
      ),
  )
  def test_wrong_flags_are_named_and_write_nothing(self, flags, message):
    workdir = pathlib.Path(self.create_tempdir().full_path) / "new"
    where = [] if flags is None else [f"--workdir={workdir}"]
    result = _run(*where, *(flags or []), check=False)
    self.assertNotEqual(result.returncode, 0)
    self.assertRegex(result.stderr, message)
    self.assertNotIn("Traceback", result.stderr)
    self.assertFalse(workdir.exists())


if __name__ == "__main__":
  absltest.main()
