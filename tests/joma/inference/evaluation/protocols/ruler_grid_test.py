"""Rows of RULER's tasks: which are measured, kept, and summed up."""

import dataclasses
import json
import pathlib
from unittest import mock

from absl.testing import absltest
import numpy as np

from joma.inference.evaluation import evaluate_config
from joma.inference.evaluation import evaluate_grid
from joma.inference.evaluation.protocols import leaderboard
from joma.inference.evaluation.protocols import reading
from joma.inference.evaluation.protocols import ruler_grid
from joma.inference.evaluation.protocols import ruler_report
from joma.inference.evaluation.protocols import saved_rows
from joma.inference.evaluation.ruler import ruler_config
from joma.inference.evaluation.ruler import written
from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.text import tokenizer
from scansnap_jax.experiment import intervals

_CONFIG = evaluate_config.EvaluateConfig(
    tasks=("ruler",),
    policies=("h2o",),
    num_seeds=2,
    batch_size=2,
    length=900,
    ruler=ruler_config.RulerConfig(
        names=("niah_single_1", "fwe", "qa_1"),
        budgets=(0.5, 0.25),
        depths=(0.0, 1.0),
        lengths=(500,),
    ),
)
_SHAPE = configs.TransformerConfig(
    vocab_size=256,
    num_layers=1,
    embed_dim=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    hidden_dim=8,
    max_len=2048,
)


class _Cut(Exception):
  pass


def _reader():
  bytes_ = tokenizer.Bytes()
  subject = evaluate_grid.Subject(
      model=models.Transformer(_SHAPE), params=None, tokenizer=bytes_
  )
  return ruler_grid.Reader(subject, written.Writer(bytes_))


class _Answers:
  """Stands for a model: says what it likes, and counts what it was asked."""

  def __init__(self, says):
    self._says, self.asked = says, []

  def __call__(self, setting, model, params, texts, num_new):
    del model, params
    self.asked.append((setting.make_caches.policy, setting.budget, num_new))
    said = []
    for text in texts:
      whole = bytes([*text.context, *text.question]).decode()
      said.append(tokenizer.Bytes().encode(self._says(whole, setting.budget)))
    return said


def _right_but_for_words(whole, budget):
  """Repeats the text: right; nothing of coded words, and little by window."""
  if "coded" in whole:
    return "none"
  return whole if budget > 0.3 else whole[:150]


def _measure(
    config=_CONFIG, workdir=None, says=_right_but_for_words, **options
):
  answers = _Answers(says)
  with mock.patch.object(reading, "answer", answers):
    found = ruler_grid.measure(config, _reader(), workdir, **options)
  return found, answers.asked


def _timeless(rows):
  return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


class GridTest(absltest.TestCase):

  def test_policies_are_not_measured_where_full_fails(self):
    told = []
    found, asked = _measure(on_progress=told.append)
    rows, map_ = found["rows"], found["map"]
    settings = [(r["policy"], r["budget"], r["task"]) for r in rows]
    expected = [("full", 1.0, task) for task in _CONFIG.ruler.names]
    for policy in ("h2o", "window", "random"):
      for budget in (0.25, 0.5):
        for task in ("niah_single_1", "qa_1"):
          expected.append((policy, budget, task))
    self.assertEqual(settings, expected)
    # Of two batches each: three tasks, then two, then two depths.
    self.assertLen(asked, 2 * (3 + 6 * 2 + 4 * 2))
    self.assertEqual(sum(told), ruler_grid.num_cells(_CONFIG))
    self.assertEqual({n for _, _, n in asked}, {128, 50, 32})
    self.assertEqual(
        [(r["policy"], r["depth"], r["length"]) for r in map_[:4]],
        [("full", 0, 500), ("full", 1, 500)]
        + [("h2o", d, 500) for d in (0, 1)],
    )
    self.assertEqual(rows[0]["scores"], [1.0] * 4)
    self.assertEqual(rows[1]["scores"], [0.0] * 4)

  def test_texts_differ_and_are_the_same_for_all(self):
    texts = {}

    def says(whole, budget):
      texts.setdefault(budget, []).append(whole)
      return whole

    config = dataclasses.replace(
        _CONFIG,
        policies=("full",),
        ruler=ruler_config.RulerConfig(names=("niah_single_1",)),
    )
    _measure(config, says=says)
    self.assertLen(set(texts[1.0]), 4)
    self.assertEqual(texts[0.5][:4], texts[1.0])
    self.assertLessEqual(max(map(len, texts[1.0])), 900)

  def test_a_run_that_was_cut_goes_on_from_its_rows(self):
    workdir = pathlib.Path(self.create_tempdir().full_path)
    left = iter(range(6))

    def cut(_):
      if next(left, None) is None:
        raise _Cut()

    with self.assertRaises(_Cut):
      _measure(workdir=workdir, on_progress=cut)
    kept = (workdir / "rows.jsonl").read_text()
    self.assertLen(kept.splitlines(), 6)
    # A kill in the middle of a row leaves part of it.
    with open(workdir / "rows.jsonl", "a") as file:
      file.write('{"task": "qa_1", "poli')
    found, asked = _measure(workdir=workdir)
    whole, all_asked = _measure()
    self.assertStartsWith((workdir / "rows.jsonl").read_text(), kept)
    self.assertEqual(_timeless(found["rows"]), _timeless(whole["rows"]))
    self.assertEqual(_timeless(found["map"]), _timeless(whole["map"]))
    self.assertLen(asked, len(all_asked) - 2 * 6)
    _, asked = _measure(workdir=workdir)
    self.assertEmpty(asked)


class SavedRowsTest(absltest.TestCase):

  def test_rows_are_found_by_what_they_are_of(self):
    workdir = pathlib.Path(self.create_tempdir().full_path)
    rows = saved_rows.SavedRows(workdir, {"task": "a"})
    rows.add({"value": float("nan"), "list": [1, 2.5]}, policy="h2o", slots=3)
    other = saved_rows.SavedRows(workdir, {"task": "b"})
    self.assertIsNone(other.find(policy="h2o", slots=3))
    again = saved_rows.SavedRows(workdir, {"task": "a"})
    found = again.find(policy="h2o", slots=3)
    self.assertEqual(found["list"], [1, 2.5])
    self.assertTrue(np.isnan(found["value"]))
    self.assertEqual(set(found), {"value", "list"})
    self.assertIsNone(again.find(policy="h2o", slots=4))


def _row(policy, budget, task, scores):
  return dict(
      policy=policy,
      budget=budget,
      task=task,
      scores=scores,
      length=9,
      depth=None,
  )


class LeaderboardTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.rows = [
        _row("full", 1.0, "vt", [1, 1, 0.5, 1]),
        _row("full", 1.0, "fwe", [0, 0.25, 0, 0]),
        _row("full", 1.0, "qa_1", [1, 0, 1, 1]),
        _row("h2o", 0.5, "vt", [0, 1, 0, 1]),
        _row("h2o", 0.5, "qa_1", [0, 0, 1, 1]),
        _row("random", 0.5, "vt", [0, 0, 0, 0]),
        _row("random", 0.5, "qa_1", [0, 0, 0, 1]),
    ]
    self.board = leaderboard.make(self.rows, 0.5)

  def test_means_leave_out_what_full_fails(self):
    self.assertEqual(self.board.passed, ("vt", "qa_1"))
    mean = self.board.scores["h2o", 0.5]["mean"]
    # Texts: (0, 0), (1, 0), (0, 1), (1, 1), each over two tasks.
    expected = intervals.interval(
        np.array([0, 50, 50, 100.0]), least=0, most=100
    )
    self.assertEqual(mean, expected)
    full = self.board.scores["full", 1.0]["mean"]["mean"]
    self.assertAlmostEqual(full, 100 * np.mean([1, 0.5, 0.75, 1]))

  def test_the_table_marks_what_full_fails(self):
    header, cells = ruler_report.table(self.board)
    self.assertEqual(
        header, ["policy", "kept", "mean", "vt", "fwe (failed)", "qa_1"]
    )
    self.assertEqual(cells[0][0:2], ["full", "100 %"])
    self.assertStartsWith(cells[0][4], "6.2 ± ")
    self.assertEqual([row[4] for row in cells[1:]], ["–", "–"])
    self.assertStartsWith(cells[1][2], "50.0 ± ")
    self.assertIn("fails fwe", ruler_report.finding(self.board, "aware"))
    # Four texts each: 50 [-15, 115] and 12.5 [-27, 52], cut to what can be.
    self.assertIn(
        "H2O has 50.0, and is not apart from random (95 % intervals overlap)",
        ruler_report.finding(self.board, "aware"),
    )

  def test_where_full_fails_all_there_is_no_mean(self):
    board = leaderboard.make(self.rows[1:2], 0.5)
    self.assertEqual(ruler_report.table(board)[1][0][2], "–")
    self.assertIn("fails every task", ruler_report.finding(board, "aware"))

  def test_a_report_has_table_curves_and_map(self):
    workdir = pathlib.Path(self.create_tempdir().full_path)
    map_ = [
        _row(name, budget, "niah_single_1", [score])
        | {"depth": depth, "length": 64}
        for name, budget in (("full", 1.0), ("h2o", 0.5))
        for depth, score in ((0.0, 1.0), (0.5, 0.25))
    ]
    summary = dict(rows=self.rows, map=map_, protocol="aware", passes=0.5)
    path = ruler_report.write(workdir, summary, {}, 0.0)
    text = path.read_text()
    self.assertEqual(text.count("data:image/png;base64"), 2)
    self.assertIn("50.0 ±", text)
    found = json.loads((workdir / "summary.json").read_text())
    self.assertLen(found["rows"], 7)


if __name__ == "__main__":
  absltest.main()
