"""What the report of evaluated policies says, from numbers made up."""

import json
import math
import pathlib
import time

from absl.testing import absltest
import pytest

from joma.inference.evaluation import drawing
from joma.inference.evaluation import report


def _parts(mean, half=0.01):
  return {"mean": mean, "low": mean - half, "high": mean + half}


def _row(policy, slots, quality, recall=None, **changes):
  return {
      "policy": policy,
      "budget": slots / 64,
      "slots": slots,
      "quality": _parts(quality),
      "recall": _parts(quality if recall is None else recall),
      "gold_in_sinks": 0.25,
      "kept_mass": None,
      "step_bytes": 10**6 + 1000 * slots,
      "step_cache_bytes": 1000 * slots,
      "cache_bytes": 900 * slots,
      "ms_per_step": 1.25,
      "compilations": 1,
      "num_texts": 12,
      **changes,
  }


def _rows(h2o=(0.5, 0.9), streaming=(0.3, 0.8)):
  rows = [_row("full", 64, 1.0)]
  for i, slots in enumerate((16, 32)):
    rows += [
        _row("window", slots, 0.1 + 0.1 * i),
        _row("random", slots, 0.2, ms_per_step=None),
        _row("h2o", slots, h2o[i], kept_mass=_parts(0.6)),
        _row("streaming_llm", slots, streaming[i]),
    ]
  return rows


def _texts():
  return [
      _row("full", 64, 3.0)
      | {"perplexity": _parts(20.0), "ratio": _parts(1.0, 0)},
      _row("window", 16, 4.2)
      | {"perplexity": _parts(70.0), "ratio": _parts(3)},
      _row("h2o", 16, 3.1) | {"perplexity": _parts(22.0), "ratio": _parts(1.1)},
  ]


class ReportTest(absltest.TestCase):

  def test_names_the_best_beside_window_and_random(self):
    said = report.finding("mqar", _rows())
    self.assertIn("full cache 1.000. With 16 slots, 25 % of the text", said)
    self.assertIn("H2O is best with 0.500, beside window 0.100", said)
    self.assertIn("and random 0.200", said)
    self.assertIn("at least as many gold tokens as StreamingLLM", said)

  def test_nothing_is_ranked_where_the_full_cache_fails(self):
    rows = _rows(h2o=(0.041, 0.05), streaming=(0.031, 0.04))
    rows[0]["quality"] = _parts(0.047)
    said = report.finding("mqar", rows)
    self.assertEqual(
        said, "mqar: the full cache fails with 0.047: no policy is ranked."
    )

  def test_what_overlaps_is_not_best(self):
    said = report.finding("mqar", _rows(streaming=(0.485, 0.8)))
    self.assertIn(
        "H2O has 0.500, and is not apart from StreamingLLM (95 % intervals"
        " overlap), beside window 0.100",
        said,
    )
    self.assertNotIn("best", said)

  def test_of_perplexities_the_least_is_best(self):
    said = report.finding("perplexity", _texts())
    self.assertIn("H2O is best with 22.00, beside window 70.00.", said)

  def test_says_where_fewer_gold_tokens_are_kept_and_why(self):
    said = report.finding("mqar", _rows(h2o=(0.295, 0.7)))
    self.assertIn("0.29 against 0.30 with 16 slots (intervals overlap)", said)
    self.assertIn("0.70 against 0.80 with 32 slots;", said)
    self.assertIn("25 % of them stand in StreamingLLM's sinks", said)

  def test_as_many_gold_tokens_are_not_fewer(self):
    said = report.finding("mqar", _rows(h2o=(0.3, 0.8)))
    self.assertIn("at least as many gold tokens as StreamingLLM", said)
    # One hundredth less at one budget is fewer there, and there alone.
    said = report.finding("mqar", _rows(h2o=(0.3, 0.79)))
    self.assertNotIn("0.30 against 0.30", said)
    self.assertIn("0.79 against 0.80 with 32 slots", said)

  @pytest.mark.slow
  def test_writes_a_report_of_all_tasks(self):
    workdir = pathlib.Path(self.create_tempdir().full_path)
    summary = {
        "tasks": {"mqar": _rows(), "perplexity": _texts()},
        "training": {"losses": [3.0, 0.1]},
        "length": 64,
    }
    path = report.write(workdir, summary, {}, time.monotonic())
    text = path.read_text()
    self.assertEqual(text.count("data:image/png;base64"), 2)
    self.assertIn("loss 3.000 to 0.100 nats", text)
    self.assertIn("0.500 ± 0.010", text)
    written = json.loads((workdir / "summary.json").read_text())
    self.assertLen(written["finding"], 2)
    self.assertEqual(written["tasks"]["mqar"], _rows())

  def test_a_policy_that_failed_is_named_and_the_others_are_drawn(self):
    workdir = pathlib.Path(self.create_tempdir().full_path)
    nan = {"mean": math.nan, "low": math.nan, "high": math.nan}
    bad = {"quality": nan, "perplexity": nan, "ratio": nan, "failed": "NaN"}
    rows, texts = _rows(), _texts()
    rows[3] |= bad  # H2O with 16 slots, which would be the best there.
    texts[0] |= bad  # The full cache.
    summary = {"tasks": {"mqar": rows}, "training": None, "length": 64}
    path = report.write(workdir, summary, {}, time.monotonic())
    (said,) = json.loads((workdir / "summary.json").read_text())["finding"]
    self.assertIn("StreamingLLM is best with 0.300", said)
    self.assertIn("H2O with 16 slots failed: NaN.", said)
    self.assertIn("<td>failed</td>", path.read_text())
    said = report.finding("perplexity", texts)
    self.assertStartsWith(
        said, "perplexity: With 16 slots, 25 % of the text, H2O"
    )
    drawing.draw(texts)

  def test_bytes_have_a_unit_and_an_axis_that_fit(self):
    for factor, unit in ((1, "KB"), (1000, "MB")):
      rows = _rows()
      for row in rows:
        row["step_cache_bytes"] *= factor
      axes = drawing.draw(rows).axes[2]
      axes.figure.draw_without_rendering()
      self.assertStartsWith(axes.get_xlabel(), unit)
      labels = [label.get_text() for label in axes.get_xticklabels()]
      self.assertEqual(labels[:4], ["0", "10", "20", "30"])
      # Of the policies: the full cache, of twice as much, is a line.
      most = max(row["step_cache_bytes"] for row in rows[1:]) / 1e6
      self.assertAlmostEqual(axes.get_xlim()[1], 1.05 * most)

  def test_policies_of_a_figure_look_different(self):
    names = ["h2o", "h2o:score=ema", "tova", "keydiff", "window", "random"]
    names += ["streaming_llm", "snapkv", "knorm"]
    looks = drawing.looks([_row(name, 16, 0.5) for name in names])
    self.assertLen(set(map(str, looks.values())), len(names))
    self.assertEqual(drawing.label("h2o:score=ema"), "H2O score=ema")


if __name__ == "__main__":
  absltest.main()
