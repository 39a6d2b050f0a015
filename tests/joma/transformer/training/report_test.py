import base64
import json
import os
import pathlib
import subprocess
import sys
import time

from absl.testing import absltest
import pytest

from joma.transformer.training import report
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import figures
from tests.joma.transformer.training.made import lm_runs

_ROOT = pathlib.Path(__file__).parents[4]


# A white pixel.
_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAG7buVgAA"
    "AABJRU5ErkJggg=="
)


def _save_quickly(figure, folder, name):
  """Stands for `figures.save`, which takes a second or two a figure."""
  figure.clear()
  folder.mkdir(exist_ok=True)
  paths = folder / f"{name}.png", folder / f"{name}.pdf"
  for path in paths:
    path.write_bytes(_PNG)
  return paths


class ReportLmTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    patch = pytest.MonkeyPatch()
    self.addCleanup(patch.undo)
    patch.setattr(figures, "save", _save_quickly)
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.reference = self.folder / "reference.csv"
    lm_runs.write_reference(self.reference)

  def _write(self, name, *, reference_csv=None, **kwargs):
    workdir = self.folder / name
    workdir.mkdir()
    run = lm_runs.make_run(**kwargs) | {
        "map_steps": [0, 1000, 2000],
        "map_text": "a <b> c",
        "corpus_facts": {"vocab_size": 5},
        "probes": ["sinks"],
        "named_probes": {"sinks": [[0.125, 0.5, 0.75], [0.25, None, None]]},
    }
    path = report.write(
        workdir,
        run,
        lm_runs.make_maps(3),
        facts={"command": "train"},
        started=time.monotonic(),
        reference_csv=reference_csv,
    )
    return path, json.loads((workdir / "summary.json").read_text())

  def test_a_run_has_its_figures_and_numbers(self):
    path, summary = self._write("a", reference_csv=str(self.reference))
    text = path.read_text()
    for words in (
        "a &lt;b&gt; c",
        "Attention maps",
        "authors&#x27; least",
        "sinks, after",
        ">0.125</td>",
    ):
      self.assertIn(words, text)
    self.assertEqual(text.count("<img"), 4)
    names = {p.name for p in (path.parent / "figures").iterdir()}
    for name in ("losses", "entropy", "probes", "maps"):
      self.assertLessEqual({f"{name}.png", f"{name}.pdf"}, names)
    self.assertEqual(summary["corpus_facts"], {"vocab_size": 5})
    self.assertLen(summary["maps"], 3 * 2)
    (group,) = summary["groups"]
    self.assertEqual(group["authors"]["valid_loss"]["mean"], [9.0, 8.0, 7.0])

  @pytest.mark.slow
  def test_runs_are_put_together(self):
    for name, settings in (
        ("a", {}),
        ("b", {"seed": 2}),
        ("c", {"lr": 1e-3}),
    ):
      self._write(name, **settings)
    workdir = self.folder / "together"
    workdir.mkdir()
    runs = [self.folder / name for name in "abc"]
    path = report.compare(
        workdir,
        runs,
        facts={"command": "compare"},
        started=time.monotonic(),
        reference_csv=str(self.reference),
    )
    summary = json.loads((workdir / "summary.json").read_text())
    self.assertEqual([g["seeds"] for g in summary["groups"]], [[1, 2], [1]])
    self.assertLen(summary["final_entropy"], 2)
    self.assertEqual(path.read_text().count("<img"), 3)
    self.assertIn("2 layers, lr 1e-3", path.read_text())
    self.assertIn("flags.txt", path.read_text())

  def test_a_folder_without_a_run_is_named(self):
    (self.folder / "summary.json").write_text('{"figure4": {}}')
    for folder in (self.folder / "none", self.folder):
      with self.assertRaisesRegex(errors.UserError, "no summary of a finished"):
        report.compare(self.folder, [folder], facts={}, started=0.0)

  @pytest.mark.slow
  def test_the_command_writes_a_report_elsewhere_than_a_run(self):
    self._write("a")
    (self.folder / "a" / "config.json").write_text("{}")

    def compare(workdir):
      flags = [f"--runs={self.folder / 'a'}", f"--workdir={workdir}"]
      command = [sys.executable, "-m", "launch.compare_lm", *flags]
      return subprocess.run(
          command,
          cwd=_ROOT,
          env=os.environ | {"JAX_PLATFORMS": "cpu"},
          capture_output=True,
          text=True,
      )

    done = compare(self.folder / "new")
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertTrue((self.folder / "new" / "report.html").exists())
    refused = compare(self.folder / "a")
    self.assertNotEqual(refused.returncode, 0)
    self.assertIn(
        "holds a run with other settings: runs: absent", refused.stderr
    )


if __name__ == "__main__":
  absltest.main()
