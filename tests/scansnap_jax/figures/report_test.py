import dataclasses
import functools
import itertools
import json
import pathlib
import re
import statistics
import time

from absl.testing import absltest
from absl.testing import parameterized
import chex
import numpy as np
import pytest

from scansnap_jax import config as config_lib
from scansnap_jax import data
from scansnap_jax import published
from scansnap_jax import train
from scansnap_jax.figures import report
from scansnap_jax.theorems import table

# Sums of a few float64 in another order.
_ATOL = 1e-12
# Ten times the largest float32 error seen.
_FLOW_ATOL = 3e-4

_DATA = config_lib.DataConfig
_MODEL = config_lib.ModelConfig
_OPTIMIZER = config_lib.OptimizerConfig

_CHECKS = (
    table.TheoremCheck("Lemma 1", "deviation of f", 1e-15, 1e-12),
    table.TheoremCheck("Theorem 2", "violations", 3.0, 0.0),
)


def _results(config, num_steps=4):
  """Results of a config with the right shapes and P(l|n), and made-up curves.

  Every final value is a number of its own.
  """
  runs = train.make_runs(config)
  num_runs = len(runs.seed)
  results = []
  for num_last in config.num_last:
    random = np.random.default_rng(num_last)
    classes = data.make_classes(config.data, num_last)
    curve = lambda low, high, num, random=random: random.uniform(
        low, high, (num_runs, num)
    ).astype(np.float32)
    attended = np.broadcast_to(
        classes.probs, (num_runs, 1, *classes.probs.shape)
    )
    history = train.History(
        losses=curve(1e-5, 1, num_steps),
        distinct_entropy=curve(1.5, 2.1, 2),
        common_mass=curve(0.3, 0.6, 2),
        attended=attended.astype(np.float32),
    )
    steps = np.array([0, num_steps])
    results.append(
        train.Result(num_last, classes, runs, steps, history, params={})
    )
  return results


def _small(name, **changes):
  """A figure's config with a sweep small enough to read."""
  base = getattr(config_lib, name)()
  smaller = dict(num_seeds=3)
  if name == "figure6":
    smaller |= dict(num_last=(1, 5), lr_z=(0.5, 1.0), lr_ratio=(2.0, 10.0))
  return dataclasses.replace(base, **{**smaller, **changes})


def _summarize(name, config, checks=()):
  return report.summarize({name: config}, {name: _results(config)}, [*checks])


def _own(result, lr_z, lr_ratio, curves):
  """Final values of a pair of rates, run by run, as Python floats."""
  pairs = zip(result.runs.lr_z, result.runs.lr_ratio, strict=True)
  return [
      float(curves[r, -1])
      for r, pair in enumerate(pairs)
      if np.allclose(pair, (lr_z, lr_ratio))
  ]


class CellsTest(parameterized.TestCase):

  def test_means_and_sample_deviations_are_over_seeds(self):
    config = _small("figure6", num_last=(3,), lr_z=(0.1, 0.3), first_seed=9)
    (result,) = _results(config)
    rows = report.cells(result)
    # Rates as they were given, not their float32.
    self.assertEqual(
        [(row["lr_z"], row["lr_ratio"]) for row in rows],
        [*itertools.product((0.1, 0.3), (2.0, 10.0))],
    )
    for row in rows:
      self.assertEqual(
          (row["num_last"], row["num_next"], row["num_seeds"]), (3, 6, 3)
      )
      for name, curves in (
          ("entropy", result.history.distinct_entropy),
          ("common_mass", result.history.common_mass),
          ("last_batch_loss", result.history.losses),
      ):
        own = _own(result, row["lr_z"], row["lr_ratio"], curves)
        self.assertLen(own, 3)
        chex.assert_trees_all_close(
            (row[f"{name}_mean"], row[f"{name}_std"]),
            (statistics.mean(own), statistics.stdev(own)),
            atol=_ATOL,
            rtol=0,
        )

  def test_a_single_seed_has_no_deviation(self):
    (result,) = _results(_small("figure4", num_seeds=1))
    rows = report.cells(result)
    self.assertLen(rows, 2)
    for r, row in enumerate(rows):
      self.assertEqual(row["num_seeds"], 1)
      self.assertEqual(
          row["entropy_mean"], float(result.history.distinct_entropy[r, -1])
      )
      for name in ("entropy", "common_mass", "last_batch_loss"):
        self.assertIsNone(row[f"{name}_std"])

  def test_authors_values_stand_beside_ours_where_known_and_asked_for(self):
    known, unknown = _results(_small("figure6"))  # 1 and 5 queries.
    for row in report.cells(known, show_published=True):
      cell = published.figure6_cell(1, 2, row["lr_z"], row["lr_ratio"])
      self.assertEqual(
          (row["published_mean"], row["published_std"]), (cell.mean, cell.std)
      )
    for rows in (
        report.cells(known),
        report.cells(unknown, show_published=True),
    ):
      self.assertLen(rows, 4)
      for row in rows:
        self.assertNoCommonElements(row, ("published_mean", "published_std"))


class IsPublishedTest(parameterized.TestCase):

  @parameterized.parameters("figure4", "figure6", "figure11", "figure12")
  def test_the_papers_own(self, name):
    config = getattr(config_lib, name)()
    self.assertTrue(report._is_published(name, config))

  @parameterized.product(
      name=("figure4", "figure6"),
      change=(
          dict(first_seed=100),
          dict(num_seeds=2),
          dict(num_last=(3,)),
          dict(lr_z=(2.0,)),
          dict(lr_ratio=(5.0,)),
          dict(log_every=7, checkpoint_every=9),
          dict(record_attention=True),
          dict(record_attention=False),
      ),
  )
  def test_swept_and_recorded_fields_do_not_matter(self, name, change):
    config = dataclasses.replace(getattr(config_lib, name)(), **change)
    self.assertTrue(report._is_published(name, config))

  @parameterized.product(
      name=("figure4", "figure6", "figure11", "figure12"),
      change=(
          dict(optimizer=_OPTIMIZER(momentum=0.8)),
          dict(optimizer=_OPTIMIZER(name="sgd")),
          dict(optimizer=_OPTIMIZER(name="adam")),
          dict(data=_DATA(num_next_per_last=3)),
          dict(data=_DATA(num_next_per_last=2, seq_len=None)),
          dict(data=_DATA(seq_len=64)),
          dict(data=_DATA(num_common=9)),
          dict(model=_MODEL(zero_init=False, use_residual=True)),
          dict(model=_MODEL(normalization="none")),
          dict(batch_size=64),
          dict(num_steps=99),
      ),
  )
  def test_another_experiment(self, name, change):
    config = dataclasses.replace(getattr(config_lib, name)(), **change)
    self.assertFalse(report._is_published(name, config))

  @parameterized.parameters(
      ("figure4", "figure6"),
      ("figure6", "figure4"),
      ("figure5", "figure5"),
      ("sweep", "figure4"),
      ("sweep", "figure6"),
  )  # pyformat: disable
  def test_another_figure(self, name, settings):
    config = getattr(config_lib, settings)()
    self.assertFalse(report._is_published(name, config))


class SummarizeTest(parameterized.TestCase):

  @parameterized.parameters(
      ("figure4", {}, ("1", "10")),
      ("figure4", dict(lr_ratio=(0.1, 2.5)), ("0.1", "2.5")),
      ("figure5", {}, ("0.1", "0.5", "1")),
  )
  def test_figures_4_and_5_are_by_rate(self, name, change, keys):
    config = _small(name, **change)
    summary = _summarize(name, config)
    self.assertEqual([*summary], [name])
    self.assertEqual([*summary[name]], [*keys])
    axis = "lr_ratio" if name == "figure4" else "lr_z"
    for key, row in summary[name].items():
      self.assertEqual(row[axis], float(key))
      (result,) = _results(config)
      history = result.history
      for field, curves in (
          ("distinct_entropy", history.distinct_entropy),
          ("common_mass", history.common_mass),
      ):
        own = _own(result, row["lr_z"], row["lr_ratio"], curves)
        chex.assert_trees_all_close(
            row[field], statistics.mean(own), atol=_ATOL, rtol=0
        )
      # One leader a class of each run.
      num_runs = row["num_seeds"] * result.classes.num_classes
      self.assertEqual(sum(row["leading_ranks"]), num_runs)

  @parameterized.parameters("figure6", "figure11", "figure12", "sweep")
  def test_others_are_a_row_a_cell(self, name):
    rows = _summarize(name, _small("figure6"))[name]
    self.assertEqual(
        [(row["num_last"], row["lr_z"], row["lr_ratio"]) for row in rows],
        [*itertools.product((1, 5), (0.5, 1.0), (2.0, 10.0))],
    )
    for row in rows:
      self.assertContainsSubset(
          ("entropy_mean", "entropy_std", "num_seeds"), row
      )
      is_known = name != "sweep" and row["num_last"] == 1
      self.assertEqual("published_mean" in row, is_known)

  def test_other_momentum_is_not_held_against_the_authors(self):
    config = _small("figure6", optimizer=_OPTIMIZER(momentum=0.5))
    for row in _summarize("figure6", config)["figure6"]:
      self.assertNotIn("published_mean", row)

  def test_theorems_are_a_row_a_check(self):
    rows = _summarize("figure4", _small("figure4"), _CHECKS)["theorems"]
    common = [
        {key: row[key] for key in ("name", "measured", "bound", "holds")}
        for row in rows
    ]
    self.assertEqual(
        common,
        [
            dict(name="Lemma 1", measured=1e-15, bound=1e-12, holds=True),
            dict(name="Theorem 2", measured=3.0, bound=0.0, holds=False),
        ],
    )
    self.assertEqual(
        [row["statement"] for row in rows], ["deviation of f", "violations"]
    )

  @parameterized.product(name=("figure4", "figure6"), num_seeds=(1, 3))
  def test_is_strict_json_that_reads_back_equal(self, name, num_seeds):
    config = _small(name, num_seeds=num_seeds)
    summary = _summarize(name, config, _CHECKS)
    text = json.dumps(summary, allow_nan=False)
    self.assertEqual(json.loads(text), summary)


class WriteTest(parameterized.TestCase):

  def _write(self, configs, checks=()):
    workdir = pathlib.Path(self.create_tempdir().full_path)
    results = {name: _results(config) for name, config in configs.items()}
    sections = [
        report.draw_section(workdir, name, configs[name], results[name])
        for name in configs
    ]
    path = report.write(
        workdir,
        *(configs, results, sections, [*checks]),
        {"command": "python <my> script"},
        time.monotonic() - 12.34,
    )
    self.assertEqual(path, workdir / "report.html")
    refuse = lambda constant: self.fail(f"{constant} is no JSON.")
    text = (workdir / "summary.json").read_text()
    summary = json.loads(text, parse_constant=refuse)
    return workdir, path.read_text(), summary

  def test_a_statement_that_does_not_hold_stands_out(self):
    _, html, summary = self._write({}, _CHECKS)
    rows = re.findall(r"<tr><td>(.*?)</td>.*<td>(.*?)</td></tr>", html)
    self.assertEqual(rows, [("Lemma 1", "yes"), ("Theorem 2", "NO")])
    self.assertIn("1 of 2 statements hold", html)
    self.assertEqual([t["holds"] for t in summary["theorems"]], [True, False])

  @parameterized.parameters(("figure6", True), ("sweep", False))
  @pytest.mark.by_default(0)
  def test_table_has_the_authors_column_where_it_is_known(self, name, known):
    config = _small("figure6", num_seeds=2)
    workdir, html, summary = self._write({name: config})
    self.assertEqual("authors&#x27; entropy" in html, known)
    cell = published.figure6_cell(1, 2, 0.5, 2.0)
    self.assertEqual(f"{cell.mean:.3f} ± {cell.std:.3f}" in html, known)
    first = summary[name][0]
    ours = f"{first['entropy_mean']:.3f} ± {first['entropy_std']:.3f}"
    self.assertIn(f">{ours}</td>", html)
    self.assertIn("2 seeds", html)
    for suffix in ("png", "pdf"):
      self.assertTrue((workdir / "figures" / f"{name}.{suffix}").exists())
    self.assertNotIn("theorems", summary)

  def test_facts_are_escaped_and_timed(self):
    _, html, _ = self._write({}, _CHECKS)
    self.assertIn("python &lt;my&gt; script", html)
    self.assertRegex(html, r"<dd>12\.\d s")


@functools.cache
def _predict(name="momentum", lr_z=1.0, steps=(0, 2, 4, 8, 32)):
  """Curves (entropy, common mass) by ratio, of Syn-Small over some steps."""
  config = config_lib.ScanSnapConfig(
      optimizer=_OPTIMIZER(name=name), lr_z=(lr_z,), lr_ratio=(1.0, 10.0)
  )
  (result,) = _results(config)
  curves = report.predict_by_flow(
      config, result._replace(steps=np.array(steps))
  )
  for times, *_ in curves.values():
    np.testing.assert_array_equal(times, steps)
  return {ratio: values for ratio, (_, *values) in curves.items()}


class PredictByFlowTest(parameterized.TestCase):

  @parameterized.parameters(
      dict(optimizer=_OPTIMIZER(name="adam")),
      dict(model=_MODEL(zero_init=False)),
      dict(model=_MODEL(zero_init=False, parametrization="original")),
      dict(model=_MODEL(normalization="none")),
      dict(model=_MODEL(use_residual=True)),
      dict(model=_MODEL(query_in_context=True)),
  )
  def test_nothing_where_the_flow_is_of_another_model(self, **changes):
    config = _small("figure4", **changes)
    (result,) = _results(config)
    self.assertIsNone(report.predict_by_flow(config, result))

  @parameterized.product(name=("momentum", "sgd"), ratio=(1.0, 10.0))
  def test_starts_at_syn_small_before_training(self, name, ratio):
    # Weights .1, .2, ..., 1 of the distinct tokens sum to 5.5; the ten common
    # tokens of weight 1 hold 10 of 15.5.
    shares = np.arange(1, 11) / 55
    start = -(shares * np.log(shares)).sum(), 10 / 15.5
    np.testing.assert_allclose(start[0], 2.15128, atol=5e-6)
    entropy, mass = _predict(name)[ratio]
    chex.assert_trees_all_close(
        (float(entropy[0]), float(mass[0])), start, atol=1e-6, rtol=0
    )

  @pytest.mark.slow
  def test_attention_turns_to_distinct_tokens_less_at_a_larger_ratio(self):
    curves = _predict()
    self.assertEqual([*curves], [1.0, 10.0])
    for entropy, mass in curves.values():
      self.assertLess(np.diff(entropy).max(), 0)
      self.assertLess(np.diff(mass).max(), 0)
    self.assertLess(curves[1.0][0][-1], curves[10.0][0][-1] - 0.01)

  def test_twice_the_rates_is_half_the_time_without_momentum(self):
    # dY/dt and dZ/dt are proportional to the rates.
    chex.assert_trees_all_close(
        _predict("sgd", lr_z=2.0, steps=(0, 1, 2, 4, 16)),
        _predict("sgd"),
        atol=_FLOW_ATOL,
        rtol=0,
    )

  @pytest.mark.slow
  def test_momentum_starts_later_and_goes_further(self):
    # From rest, but later at up to 1 / (1 - .9) times the speed.
    (slow, _), (fast, _) = _predict("sgd")[1.0], _predict()[1.0]
    self.assertGreater(fast[1], slow[1])
    self.assertLess(fast[-1], slow[-1])


if __name__ == "__main__":
  absltest.main()
