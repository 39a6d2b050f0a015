import json
import os
import pathlib
import re
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

_ROOT = pathlib.Path(__file__).parent.parent.parent
_TINY = (
    "--num_seeds=2",
    "--num_steps=4",
    "--log_every=2",
    "--batch_size=8",
    "--num_cpu_devices=2",
)


def _run(*args, check=True):
  result = subprocess.run(
      [sys.executable, "-m", "launch.scansnap", *args],
      capture_output=True,
      text=True,
      cwd=_ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      check=False,
  )
  if check and result.returncode:
    raise AssertionError(result.stderr)
  return result


class ScanSnapTest(parameterized.TestCase):

  def test_help_does_not_import_jax(self):
    code = (
        "import sys; from launch import scansnap;"
        " assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=_ROOT)
    result = _run("--help", check=False)
    self.assertIn("--optimizer.momentum: Heavy-ball coefficient", result.stdout)

  @pytest.mark.slow
  def test_main_job_writes_everything(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    first = folder / "first"
    result = _run(f"--workdir={first}", *_TINY)
    # One line as each setting ends, and what a slow machine says meanwhile.
    ends = re.findall(r"(?m)^(\w+): done in [\d.]+ s", result.stderr)
    self.assertEqual(ends, ["figure4", "figure6"])
    summary = json.loads((first / "summary.json").read_text())
    self.assertEqual(set(summary["figure4"]), {"1", "10"})
    self.assertLess(summary["figure4"]["1"]["distinct_entropy"], np.log(10))
    rows = summary["figure6"]
    self.assertEqual(
        {(r["num_last"], r["lr_z"], r["lr_ratio"]) for r in rows},
        {
            (m, z, ratio)
            for m in (1, 3, 5, 10)
            for z in (0.5, 1, 2, 3)
            for ratio in (1, 2, 5, 10)
        },
    )
    self.assertEqual({r["num_seeds"] for r in rows}, {2})
    self.assertTrue(all(r["entropy_std"] > 0 for r in rows))
    self.assertTrue(all(t["holds"] for t in summary["theorems"]))
    report = (first / "report.html").read_text()
    self.assertLen(re.findall("data:image/png;base64", report), 2)
    for name in ("metrics.jsonl", "flags.txt", "config.json", "checkpoints"):
      self.assertTrue((first / name).exists(), name)
    for figure in ("figure4", "figure6"):
      for suffix in ("png", "pdf"):
        self.assertTrue((first / "figures" / f"{figure}.{suffix}").exists())

    flags = (first / "flags.txt").read_text().split()
    self.assertEqual(flags[:2], ["--preset=main", "--num_seeds=2"])

  @pytest.mark.slow
  def test_presets_resolve_and_replay(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    first, second = folder / "first", folder / "second"
    _run("--preset=figure5", "--lr_z=.3", f"--workdir={first}", *_TINY)
    flags = (first / "flags.txt").read_text()
    self.assertIn("--optimizer.name=adam", flags)
    self.assertIn("--lr_z=0.3", flags)
    _run(f"--flagfile={first}/flags.txt", f"--workdir={second}")
    self.assertEqual(
        (second / "summary.json").read_text(),
        (first / "summary.json").read_text(),
    )

  @parameterized.parameters("figure3", "figure8", "figure9")
  @pytest.mark.slow
  def test_theory_presets_draw(self, preset):
    workdir = pathlib.Path(self.create_tempdir().full_path)
    _run(f"--preset={preset}", f"--workdir={workdir}")
    self.assertTrue((workdir / "figures" / f"{preset}.pdf").exists())
    self.assertIn("base64", (workdir / "report.html").read_text())

  def test_sweep_draws(self):
    self._check_sweep("sweep")

  @pytest.mark.slow
  @parameterized.parameters("figure11", "figure12")
  @pytest.mark.slow
  def test_sweep_presets_draw(self, preset):
    self._check_sweep(preset)

  def _check_sweep(self, preset):
    workdir = pathlib.Path(self.create_tempdir().full_path)
    _run(f"--preset={preset}", "--num_last=2", f"--workdir={workdir}", *_TINY)
    row, *_ = json.loads((workdir / "summary.json").read_text())[preset]
    self.assertEqual(row["num_last"], 2)
    self.assertTrue((workdir / "figures" / f"{preset}.png").exists())

  @parameterized.named_parameters(
      ("unknown", ["--num_step=3"], "did you mean --num_steps"),
      ("ill_typed", ["--num_steps=ten"], "num_steps.*ten"),
      ("zero_steps", ["--num_steps=0"], "num_steps must be at least 1, got 0"),
      ("no_distinct", ["--data.num_distinct_per_next=0"], "distinct tokens"),
      ("choice", ["--optimizer.name=adamw"], "momentum.*sgd.*adam"),
      ("preset", ["--preset=figure7"], "figure7"),
      ("momentum", ["--optimizer.momentum=1"], r"\[0, 1\), got 1"),
      ("rate", ["--lr_z=1,-2"], "lr_z must be positive.*-2"),
      (
          "classes",
          ["--data.classes_file=/absent.npz", "--num_last=1"],
          "/absent",
      ),
      ("no_workdir", None, "workdir"),
      ("two_axes", ["--preset=figure4", "--lr_z=1,2"], "single lr_z"),
      ("one_class", ["--num_last=1"], "one class"),
      ("length", ["--data.seq_len=100000000"], "exact up to"),
      ("equal_rates", ["--lr_z=1,1.00000001"], "differ in float32"),
      ("tiny_rate", ["--lr_z=1e-50"], "0 in float32"),
      ("no_effect", ["--preset=figure3", "--num_steps=3"], "no effect"),
      ("batch", ["--batch_size=100000000000"], "from -2147483647 to 2147"),
      ("tokens", ["--data.num_common=1000000000"], "1000000024 tokens"),
      ("overflow", ["--lr_z=1e38", "--lr_ratio=100"], "float32"),
  )
  # Those that start without jax, in a quarter of a second; two need it.
  @pytest.mark.by_default(
      *("unknown", "typed", "choice", "preset", "momentum", "rate", "classes"),
      *("workdir", "axes", "length", "effect", "batch", "overflow"),
  )
  def test_wrong_flags_are_named_and_write_nothing(self, flags, message):
    workdir = pathlib.Path(self.create_tempdir().full_path) / "new"
    where = [] if flags is None else [f"--workdir={workdir}"]
    result = _run("--preset=sweep", *where, *(flags or []), check=False)
    self.assertNotEqual(result.returncode, 0)
    self.assertRegex(result.stderr, message)
    self.assertNotIn("Traceback", result.stderr)
    self.assertFalse(workdir.exists())

  def test_probabilities_that_do_not_sum_are_named(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    path = folder / "classes.npz"
    np.savez(path, probs=[[0.5, 0.4], [0.5, 0.5]], query=[0, 0], label=[0, 1])
    result = _run(
        "--preset=sweep",
        f"--data.classes_file={path}",
        f"--workdir={folder}/new",
        *_TINY,
        check=False,
    )
    self.assertEqual(result.returncode, 2)
    self.assertRegex(
        result.stderr, f"error: .*{path}: probs must sum to 1.*0.9"
    )

  @pytest.mark.slow
  def test_a_workdir_that_is_not_ours_is_left_alone(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    file = folder / "file"
    file.write_text("mine")
    foreign = folder / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    other = folder / "other"
    _run("--preset=figure8", f"--workdir={other}")
    times = lambda: {p: p.stat().st_mtime_ns for p in other.rglob("*")}
    before = times()
    for workdir in (file, foreign, other):
      result = _run("--preset=figure9", f"--workdir={workdir}", check=False)
      self.assertEqual(result.returncode, 2, workdir)
      self.assertRegex(result.stderr, f"error: .*{workdir}")
    self.assertEqual(file.read_text(), "mine")
    self.assertEqual(os.listdir(foreign), ["thesis.tex"])
    self.assertEqual(
        before, {p: p.stat().st_mtime_ns for p in other.rglob("*")}
    )

  @pytest.mark.slow
  def test_divergence_exits_with_the_reason(self):
    workdir = pathlib.Path(self.create_tempdir().full_path) / "new"
    result = _run(
        "--preset=sweep",
        "--lr_z=1e38",
        f"--workdir={workdir}",
        *_TINY,
        check=False,
    )
    self.assertEqual(result.returncode, 2)
    self.assertRegex(result.stderr, "error: .*diverged.*lr_z=1e.38")
    self.assertFalse((workdir / "summary.json").exists())


if __name__ == "__main__":
  absltest.main()
