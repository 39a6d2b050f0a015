"""Smoke test of `launch.bridge`, as its own process, and of its report."""

import json
import os
import pathlib
import subprocess
import sys
import time

from absl.testing import absltest
import numpy as np
import pytest

from joma.inference.bridge import drawing
from joma.inference.bridge import report

_ROOT = pathlib.Path(__file__).parent.parent.parent
_TINY = (
    "--scansnap.num_seeds=2",
    "--scansnap.num_steps=4",
    "--scansnap.log_every=2",
    "--scansnap.data.seq_len=17",
    "--scansnap.batch_size=4",
    "--num_sequences=4",
    "--num_windows=8",
    "--num_lm_seeds=2",
    "--lm.tokenizer=bytes",
    "--lm.model.vocab_size=256",
    "--lm.model.embed_dim=16",
    "--lm.model.head_dim=8",
    "--lm.model.hidden_dim=16",
    "--lm.seq_len=16",
    "--lm.num_steps=4",
    "--lm.log_every=2",
    "--lm.eval_every=4",
    "--lm.checkpoint_every=4",
    "--lm.map_steps=0,2,4",
)


def _panel(rng):
  names = [*drawing.labels()]
  return {
      "steps": np.array([0, 20, 40]),
      "num_candidates": 64,
      "num_kept": 16,
      "chance": 0.25,
      "recall": {name: rng.uniform(size=(3, 3)) for name in names},
      "partial": rng.uniform(size=(3, 3)),
  }


class ReportTest(absltest.TestCase):

  @pytest.mark.slow
  def test_number_is_of_the_last_panel_and_gains_are_by_run(self):
    rng = np.random.default_rng(0)
    panels = {name: _panel(rng) for name in ("one_layer", "rotary")}
    recall = panels["rotary"]["recall"]
    recall["theory"][:, -1] = [0.5, 0.6, 0.7]
    recall["frequency"][:, -1] = [0.4, 0.5, 0.6]
    named = {"highest": ["a_b"], "lowest": ["\n"]}
    summary = report.summarize(panels, named)
    # t = 4.303 for two degrees of freedom, s = .1, n = 3.
    number = summary["number"]
    self.assertAlmostEqual(number["mean"], 0.6)
    self.assertAlmostEqual(number["high"], 0.6 + 4.3027 * 0.1 / 3**0.5, 4)
    gain = summary["over_frequency"]
    np.testing.assert_allclose([gain["low"], gain["high"]], 0.1, atol=1e-9)
    self.assertIn("0.600 [0.352, 0.848]", summary["finding"])
    figure = drawing.draw(summary["panels"])
    line = figure.axes[1].get_lines()[0]
    np.testing.assert_allclose(line.get_ydata(), recall["theory"].mean(axis=0))
    workdir = pathlib.Path(self.create_tempdir().full_path)
    path = report.write(workdir, summary, {}, time.monotonic())
    written = json.loads((workdir / "summary.json").read_text())
    self.assertEqual(written["number"], number)
    text = path.read_text()
    self.assertEqual(text.count("data:image/png;base64"), 1)
    self.assertIn("0.600 [0.352, 0.848]", text)


class BridgeTest(absltest.TestCase):

  def test_flags_do_not_wait_for_jax(self):
    code = (
        "import sys; from launch import bridge;"
        " assert not {'jax', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=_ROOT)

  @pytest.mark.slow  # Six trainings are compiled.
  def test_runs_measures_and_finds_its_measurements_again(self):
    workdir = pathlib.Path(self.create_tempdir().full_path) / "new"
    command = [sys.executable, "-m", "launch.bridge"]
    command += [*_TINY, f"--workdir={workdir}"]
    # Compilation is most of it, and what is compiled hardly runs.
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    run = lambda: subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=_ROOT,
        check=False,
        env=env,
    )
    result = run()
    self.assertEqual(result.returncode, 0, result.stderr)
    first = (workdir / "summary.json").read_text()
    summary = json.loads(first)
    self.assertIn(summary["finding"], result.stdout)
    panels = summary["panels"]
    self.assertCountEqual(panels, ("one_layer", "none", "rotary"))
    for panel in panels.values():
      self.assertEqual(panel["steps"], [0, 2, 4])
      self.assertEqual(np.shape(panel["recall"]["h2o"]), (2, 3))
      np.testing.assert_allclose(
          panel["recall"]["random"], panel["chance"], atol=1e-12
      )
    again = run()
    self.assertEqual(again.returncode, 0, again.stderr)
    self.assertEqual((workdir / "summary.json").read_text(), first)


if __name__ == "__main__":
  absltest.main()
