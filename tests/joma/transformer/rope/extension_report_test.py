"""Tests of the report on contexts longer than those of training."""

import json
import pathlib
import time

from absl.testing import absltest
import numpy as np

from joma.transformer.rope import extension_report

_NAMES = ("plain", "linear", "ntk", "yarn", "plain_tuned", "linear_tuned")


def _summary():
  rng = np.random.default_rng(0)
  curve = lambda: {
      "loss": rng.uniform(1, 2, 8),
      "error": rng.uniform(0, 0.1, 8),
      "low": rng.uniform(1, 2, 8),
      "high": rng.uniform(5, 6, 8),
      "within": 1.5,
      "beyond": np.log(7.25),
  }
  return {
      "finding": "What was found.",
      "positions": np.arange(8) * 8 + 4.5,
      "window": 16,
      "factor": 4,
      "tuning_steps": 5,
      "num_texts": 3,
      "curves": {name: curve() for name in _NAMES},
      "seen": 1.5,
      "corpus": {"corpus": "counted"},
  }


class WriteTest(absltest.TestCase):

  def test_every_curve_is_written_and_drawn(self):
    summary = _summary()
    figure = extension_report.draw(summary)
    curves = [
        line
        for line in figure.axes[0].get_lines()
        if len(line.get_xdata()) == 8
    ]
    for line, name in zip(curves, _NAMES, strict=True):
      loss = summary["curves"][name]["loss"]
      np.testing.assert_allclose(line.get_ydata(), np.exp(loss))
    workdir = pathlib.Path(self.create_tempdir().full_path)
    path = extension_report.write(
        workdir, summary, {"command": "x"}, time.monotonic()
    )
    written = json.loads((workdir / "summary.json").read_text())
    self.assertEqual(
        written["curves"]["yarn"]["loss"],
        summary["curves"]["yarn"]["loss"].tolist(),
    )
    report = path.read_text()
    self.assertIn("What was found.", report)
    self.assertEqual(report.count(">7.25<"), len(_NAMES))
    self.assertEqual(report.count("data:image/png;base64"), 1)


if __name__ == "__main__":
  absltest.main()
