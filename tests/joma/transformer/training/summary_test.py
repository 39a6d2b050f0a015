import csv
import json
import math
import os
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from joma.transformer.training import summary
from scansnap_jax.experiment import errors
from tests.joma.transformer.training.made import lm_runs

_ROOT = pathlib.Path(__file__).parents[4]
_SHARED = pathlib.Path(os.environ.get("SCANSNAP_SHARED", _ROOT / "../shared"))
# Rounding of a few float64 operations on numbers below 10.
_ATOL = 1e-12


class RunTest(absltest.TestCase):

  def test_curves_are_those_of_the_rows(self):
    rows = lm_runs.make_rows()
    run = lm_runs.make_run()
    self.assertEqual(run["steps"], list(range(0, 2001, 100)))
    self.assertEqual(run["entropy"][1][3], rows[3]["entropy/layer_1"])
    self.assertEqual(run["stable_rank"][0][0], 20.0)
    self.assertIsNone(run["train_loss"][0])
    self.assertIsNone(run["valid_loss"][1])
    self.assertEqual(run["valid_loss"][5], rows[5]["valid_loss"])
    self.assertEqual(run["optimizer"], "adam")


class GroupTest(parameterized.TestCase):

  def test_seeds_become_mean_and_sample_deviation(self):
    runs = [lm_runs.make_run(seed=seed) for seed in (1, 2, 4)]
    (group,) = summary.group_runs(runs)
    self.assertEqual(group["seeds"], [1, 2, 4])
    entropies = np.array([run["entropy"] for run in runs])
    np.testing.assert_allclose(
        group["entropy"]["mean"], entropies.mean(axis=0), atol=_ATOL
    )
    np.testing.assert_allclose(
        group["entropy"]["std"], entropies.std(axis=0, ddof=1), atol=_ATOL
    )
    last = entropies[..., -1].mean(axis=1)
    self.assertAlmostEqual(group["final_entropy"]["mean"], last.mean())
    self.assertAlmostEqual(group["final_entropy"]["std"], last.std(ddof=1))
    self.assertEqual(json.loads(json.dumps(group)), group)

  def test_one_seed_has_no_deviation(self):
    (group,) = summary.group_runs([lm_runs.make_run()])
    self.assertEqual(group["valid_loss"]["std"], [None] * 21)
    self.assertIsNone(group["final_entropy"]["std"])

  def test_speed_is_the_median_of_what_was_measured(self):
    runs = [lm_runs.make_run(seed=seed) for seed in (1, 2)]
    runs[0]["tokens_per_sec"] = [None, None, *[100.0] * 19]
    runs[1]["tokens_per_sec"] = [None, *[300.0] * 20]
    (group,) = summary.group_runs(runs)
    self.assertEqual(group["tokens_per_sec"], 300)

  def test_extremes(self):
    (group,) = summary.group_runs([lm_runs.make_run(seed=2)])
    self.assertEqual(group["best_valid_loss"], {"value": 5.0, "step": 2000})
    layer = group["layers"][1]
    self.assertEqual((layer["layer"], layer["min_step"]), (1, 1000))
    expected = {"start": 2.9, "min": 1.9, "end": 2.4, "rebound": 0.5}
    for name, value in expected.items():
      self.assertAlmostEqual(layer[name], value)

  def test_uniform_attention_is_the_mean_of_log_keys(self):
    (group,) = summary.group_runs([lm_runs.make_run()])
    expected = np.mean([math.log(t) for t in range(1, 36)])
    self.assertAlmostEqual(group["uniform_entropy"], expected)

  def test_groups_are_in_order_of_depth_and_rate(self):
    runs = [
        lm_runs.make_run(num_layers=n, lr=lr)
        for n, lr in ((2, 1e-3), (1, 1e-4), (2, 1e-4))
    ]
    groups = summary.group_runs(runs)
    keys = [(group["num_layers"], group["lr"]) for group in groups]
    self.assertEqual(keys, [(1, 1e-4), (2, 1e-4), (2, 1e-3)])

  def test_runs_meet_at_the_steps_that_all_have(self):
    runs = [
        lm_runs.make_run(),
        lm_runs.make_run(seed=2, steps=range(0, 1501, 500)),
    ]
    (group,) = summary.group_runs(runs)
    self.assertEqual(group["steps"], [0, 500, 1000, 1500])
    mean = (runs[0]["valid_loss"][5] + runs[1]["valid_loss"][1]) / 2
    self.assertAlmostEqual(group["valid_loss"]["mean"][1], mean)

  def test_a_seed_that_occurs_twice_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, r"seeds \[1, 1\]"):
      summary.group_runs([lm_runs.make_run(), lm_runs.make_run()])


class ReferenceTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(self.create_tempdir().full_path) / "a.csv"

  def test_curves_are_means_over_seeds(self):
    lm_runs.write_reference(self.path)
    reference = summary.read_reference(self.path)
    self.assertEqual(list(reference), [(1, 1e-4), (2, 1e-4)])
    found = reference[2, 1e-4]
    self.assertEqual(found["num_seeds"], 3)
    self.assertEqual(found["steps"], [0, 1000, 2000, 3000])
    self.assertEqual(found["valid_loss"]["mean"], [9.0, 8.0, 7.0, 6.0])
    self.assertEqual(found["valid_loss"]["std"], [1.0] * 4)
    self.assertEqual(
        found["entropy"]["mean"], [[2.0, 1.75, 1.5, 1.25], [1.75] * 4]
    )
    self.assertEqual(found["best_valid_loss"], {"value": 6.0, "step": 3000})
    self.assertEqual(found["layers"][0]["min_step"], 3000)

  def test_a_group_meets_its_reference_up_to_its_last_step(self):
    lm_runs.write_reference(self.path)
    reference = summary.read_reference(self.path)
    run = lm_runs.make_run(lr=float(np.float32(1e-4)))
    (group,) = summary.group_runs([run], reference)
    authors = group["authors"]
    self.assertEqual(authors["steps"], [0, 1000, 2000])
    self.assertEqual(authors["entropy"]["mean"], [[2.0, 1.75, 1.5], [1.75] * 3])
    self.assertEqual(authors["best_valid_loss"], {"value": 7.0, "step": 2000})
    self.assertEqual(authors["layers"][0]["end"], 1.5)
    middle = authors["differences"][1]
    self.assertEqual(middle["step"], 1000)
    self.assertAlmostEqual(middle["valid_loss"], 5.75 - 8)
    np.testing.assert_allclose(middle["entropy"], [-0.15, 0.05], atol=_ATOL)
    self.assertEqual(middle["chunk_entropy"], [None, None])
    self.assertEqual(json.loads(json.dumps(group)), group)

  def test_the_sequence_that_the_authors_report_is_compared_too(self):
    lm_runs.write_reference(self.path)
    reference = summary.read_reference(self.path)
    run = lm_runs.make_run(with_chunk=True)
    (group,) = summary.group_runs([run], reference)
    start = group["authors"]["differences"][0]
    np.testing.assert_allclose(start["chunk_entropy"], [0.25, 0.5], atol=_ATOL)

  def test_another_rate_has_none(self):
    lm_runs.write_reference(self.path)
    reference = summary.read_reference(self.path)
    (group,) = summary.group_runs([lm_runs.make_run(lr=2e-4)], reference)
    self.assertIsNone(group["authors"])

  @parameterized.parameters(
      "a,b\n1,2\n",
      "nlayers,lr,seed,minibatch,val_loss\n1,1,1,1,1\n",
      lm_runs.HEADER + "\n2,x,1,0,1,1,1\n",
      lm_runs.HEADER + "\n2,1,1,0,1,1,\n",
  )
  def test_another_table_is_refused(self, content):
    self.path.write_text(content)
    with self.assertRaisesRegex(errors.UserError, "a.csv is no table of"):
      summary.read_reference(self.path)

  def test_a_missing_file_is_named(self):
    with self.assertRaisesRegex(errors.UserError, "a.csv cannot be read"):
      summary.read_reference(self.path)

  @pytest.mark.realdata
  def test_extremes_of_the_authors_are_those_of_their_summary(self):
    folder = _SHARED / "reference"
    if not folder.exists():
      self.skipTest("needs reference/ in SCANSNAP_SHARED")
    reference = summary.read_reference(
        folder / "joma_wikitext2_authors_runs.csv"
    )
    with open(folder / "joma_wikitext2_authors_summary.csv") as file:
      rows = list(csv.DictReader(file))
    self.assertNotEmpty(rows)
    for row in rows:
      found = reference[int(row["nlayers"]), float(row["lr"])]
      layer = found["layers"][int(row["layer"])]
      pairs = {
          "n_seeds": found["num_seeds"],
          "min_of_seedmean_val_loss": found["best_valid_loss"]["value"],
          "at_minibatch": found["best_valid_loss"]["step"],
          "entropy_start": layer["start"],
          "entropy_min": layer["min"],
          "entropy_final": layer["end"],
          "rebound": layer["rebound"],
      }
      for name, value in pairs.items():
        # Both files have four decimals.
        self.assertAlmostEqual(value, float(row[name]), delta=2e-4, msg=row)


class MapsTest(absltest.TestCase):

  def test_numbers_of_uniform_attention_and_of_attention_to_oneself(self):
    rows = summary.summarize_maps(lm_runs.make_maps(2), [0, 500])
    self.assertLen(rows, 4)
    first, last = rows[0], rows[-1]
    self.assertEqual((last["step"], last["layer"], last["head"]), (500, 1, 0))
    keys = np.arange(1, 7)
    self.assertAlmostEqual(first["entropy"], np.log(keys).mean(), places=6)
    self.assertAlmostEqual(first["largest_weight"], (1 / keys).mean(), places=6)
    self.assertAlmostEqual(first["first_key"], (1 / keys).mean(), places=6)
    self.assertEqual(last["entropy"], 0)
    self.assertEqual(last["largest_weight"], 1)
    self.assertAlmostEqual(last["first_key"], 1 / 6, places=6)

  def test_a_layer_without_weights_has_no_numbers(self):
    maps = lm_runs.make_maps(2)
    maps[:, 0] = np.nan
    rows = summary.summarize_maps(maps, [0, 500])
    json.dumps(rows, allow_nan=False)
    self.assertEqual([row["entropy"] is None for row in rows], [1, 0, 1, 0])

  def test_rows_are_queries(self):
    maps = np.zeros((1, 1, 1, 4, 4), np.float32)
    maps[..., 0] = 1
    (row,) = summary.summarize_maps(maps, [0])
    self.assertEqual(row["largest_weight"], 1)
    self.assertEqual(row["first_key"], 1)


if __name__ == "__main__":
  absltest.main()
