"""Tests of the report on inspected models, and of its figures."""

import html
import json
import pathlib
import time
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from joma.transformer import probes
from joma.transformer.checkpoints import drawing
from joma.transformer.checkpoints import report
from scansnap_jax.experiment import figures
from scansnap_jax.experiment import report as report_lib

_OF_WEIGHTS = probes.Attention._fields


def _model(name, num_layers=3, num_heads=2, seed=0, is_gated=True):
  rng = np.random.default_rng(seed)
  of_heads = lambda: rng.uniform(0.1, 1, (num_layers, num_heads))
  names = ("entropy", "effective_support", "top_mass", "negligible")
  names += ("sink_mass",)
  ranks = ("down", "gate", "up") if is_gated else ("down", "up")
  return {
      "name": name,
      "folder": f"runs/{name}",
      "window": 8,
      **{key: of_heads() for key in names},
      "uniform": {key: np.full(num_layers, 0.5) for key in names},
      "sink_rate": rng.uniform(0, 1, num_layers),
      "stable_rank": {key: rng.uniform(1, 9, num_layers) for key in ranks},
      "loss": 2.0,
      "perplexity": np.exp(2.0),
      "num_tokens": 16,
      "num_targets": 14,
      "num_windows": 2,
  }


_FAILED = {"name": "step4", "folder": "runs/4", "failed": "it holds nan."}


class PlotTest(parameterized.TestCase):

  @parameterized.parameters(
      (["step0", "step512", "step1000"], [0, 512, 1000], "training step"),
      (["a-1", "b"], [0, 1], "checkpoint"),
      (["x2", "x1"], [0, 1], "checkpoint"),
      (["opt-125m", "opt-350m"], [0, 1], "checkpoint"),
  )
  def test_steps_are_what_names_end_in(self, names, steps, label):
    self.assertEqual(drawing.checkpoint_steps(names), (steps, label))

  def test_only_models_of_one_shape_are_a_series(self):
    one = _model("a")
    self.assertTrue(drawing.is_series([one, _model("b")]))
    self.assertFalse(drawing.is_series([one]))
    self.assertFalse(drawing.is_series([one, _model("b", 4)]))
    plain = _model("b", is_gated=False)
    self.assertFalse(drawing.is_series([one, plain]))

  def test_series_shows_every_layer_at_every_step(self):
    models = [_model(f"step{i}", seed=i) for i in (1, 4, 400)]
    figure = drawing.series(models)
    labels = {axes.get_ylabel(): axes for axes in figure.axes}
    lines = labels["entropy (nats)"].get_lines()
    self.assertLen(lines, 3)
    for layer, line in enumerate(lines):
      np.testing.assert_array_equal(line.get_xdata(), [1, 4, 400])
      expected = [np.mean(model["entropy"][layer]) for model in models]
      np.testing.assert_allclose(line.get_ydata(), expected)
    self.assertEqual(labels["entropy (nats)"].get_xscale(), "log")
    for name in ("gate", "up"):
      axes = labels[f"stable rank of W$_{{{name}}}$"]
      ranks = [model["stable_rank"][name][2] for model in models]
      np.testing.assert_allclose(axes.get_lines()[2].get_ydata(), ranks)

  def test_heads_of_a_single_layer_and_head_are_drawn(self):
    figure = drawing.heads(_model("a", 1, 1))
    images = [axes.get_images() for axes in figure.axes]
    self.assertLen([image for image in images if image], 4)


class AxesTest(parameterized.TestCase):

  @parameterized.parameters("layers", "series")
  def test_layers_and_checkpoints_are_whole_and_markers_inside(self, name):
    models = [_model(f"m{i}", num_layers=2, seed=i) for i in (2, 1)]
    figure = getattr(drawing, name)(models)
    panels = [axes for axes in figure.axes if axes.get_lines()]
    self.assertNotEmpty(panels)
    for axes in panels:
      ticks = axes.get_xticks()
      np.testing.assert_array_equal(ticks, np.round(ticks))
      top = max(np.max(line.get_ydata()) for line in axes.get_lines())
      self.assertLess(top, axes.get_ylim()[1])


class NamesTest(absltest.TestCase):

  def test_names_are_drawn_and_written_as_they_are(self):
    """No formula, no index, no HTML; a legend leaves none of them out."""
    names = ["$\\frac{$", "a_1", "_hidden", "<b>x_2</b>"]
    models = [_model(name, seed=i) for i, name in enumerate(names)]
    sections = [report_lib.Section("", "", [report._models_table(models)])]
    text = html.unescape(report_lib.render("", {}, sections))
    for name in names:
      self.assertIn(f"<td>{name}</td>", text)
    figure = drawing.layers(models)
    (legend,) = figure.legends
    shown = [entry.get_text() for entry in legend.get_texts()]
    for name, label in zip(names, shown, strict=False):
      formula, is_formula = legend.get_texts()[0]._preprocess_math(label)
      self.assertEqual((formula.lstrip("\u200b"), is_formula), (name, False))


class WriteTest(absltest.TestCase):

  @pytest.mark.slow
  def test_every_number_is_written_and_every_figure_shown(self):
    workdir = pathlib.Path(self.create_tempdir().full_path)
    models = [_model("step0"), _model("step8", seed=1)]
    models[1]["loss"] = models[1]["perplexity"] = None
    path = report.write(
        workdir,
        {"models": [models[0], _FAILED, models[1]]},
        {"command": "x"},
        time.monotonic(),
    )
    summary = json.loads((workdir / "summary.json").read_text())
    self.assertEqual(summary["models"][1], _FAILED)
    np.testing.assert_array_equal(
        summary["models"][2]["top_mass"], models[1]["top_mass"]
    )
    self.assertEndsWith(summary["finding"], " step4 failed: it holds nan.")
    self.assertIn("step0: perplexity 7.389, ", summary["finding"])
    text = path.read_text()
    self.assertEqual(text.count("data:image/png;base64"), 4)
    names = sorted(p.stem for p in (workdir / "figures").glob("*.pdf"))
    self.assertEqual(names, ["heads_0", "heads_2", "layers", "series"])
    self.assertEqual(text.count(figures.__name__), 0)

  def test_layers_without_attention_weights_are_nulls(self):
    workdir = pathlib.Path(self.create_tempdir().full_path)
    some, none = _model("some"), _model("none", num_layers=1)
    for name in (*_OF_WEIGHTS, "sink_rate"):
      some[name][1:] = np.nan
      none[name][:] = np.nan
    some["probes"] = {"local": np.full((3, 2, 4), 0.25)}
    some["probes"]["local"][1:] = np.nan
    finding = report.finding([some, none])
    self.assertIn(f"{100 * some['top_mass'][0].mean():.0f} % of", finding)
    self.assertIn("none: perplexity 7.389, no layer has attention", finding)
    png = workdir / "empty.png"
    png.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(8) + bytes([0, 0, 0, 1] * 2))
    empty = mock.patch.object(figures, "save", return_value=(png, None))
    with empty, mock.patch.object(drawing, "layers"):
      path = report.write(
          workdir, {"models": [some, none]}, {"command": "x"}, time.monotonic()
      )
    first, _ = json.loads((workdir / "summary.json").read_text())["models"]
    self.assertEqual(first["entropy"][0], some["entropy"][0].tolist())
    self.assertEqual(first["entropy"][1], [None, None])
    self.assertEqual(first["sink_rate"][1:], [None, None])
    self.assertIsNone(first["probes"]["local"][1][0][0])
    self.assertNotIn("nan", path.read_text().lower())
    self.assertIn(">0.25</td>", path.read_text())
    self.assertIn("local: weight on a query", path.read_text())


if __name__ == "__main__":
  absltest.main()
