import dataclasses
import json

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from joma.hierarchy import config as config_lib
from joma.hierarchy import data
from joma.hierarchy import scores as hierarchy_scores
from joma.hierarchy import train
from joma.studies.figures import table1

_CONFIG = config_lib.Table1Config(
    num_classes=(6,),
    num_combinations=(2,),
    num_latents_0=(6,),
    num_latents_1=(12,),
    num_seeds=3,
    num_steps=30,
)


def _hierarchies():
  return [
      data.make_hierarchy(
          seed, num_tokens=9, num_latents=(6, 12, 6), set_sizes=(2,) * 3
      )
      for seed in range(3)
  ]


def _result(**changes):
  """Scores that say who they are; used latents get 1 more than unused ones."""
  rng = np.random.default_rng(0)
  hierarchies = _hierarchies()
  values = dict(
      own=(0.6, 0.7),
      shuffled=(0.5, 0.65),
      unseen=(0.4, 0.5),
      transferred=(0.3, 0.2),
  )
  values |= changes
  scores = []
  for level, num in enumerate((6, 12, 6)):
    arrays = {}
    for name, (start, end) in values.items():
      array = np.zeros((3, 2, num), np.float32)
      for r, one in enumerate(hierarchies):
        held = one.activity[level]
        used = held.any(axis=0) & ~held.all(axis=0)
        array[r, 0, used], array[r, 1, used] = start, end + 0.01 * (r - 1)
      arrays[name] = array
    scores.append(hierarchy_scores.Scores(**arrays))
  history = train.History(
      losses=rng.random((3, 30)).astype(np.float32),
      accuracy=np.array([[0.1, 0.9], [0.2, 1.0], [0.3, 0.8]], np.float32),
      scores=tuple(scores),
  )
  cell = train.Cell(6, 2, (6, 12))
  steps = np.array([0, 30])
  return train.Result(cell, np.arange(3), hierarchies, steps, history, {})


class SummarizeTest(parameterized.TestCase):

  def test_scores_are_means_over_used_latents_spread_over_seeds(self):
    summary = table1.summarize(_CONFIG, [_result()])
    (cell,) = summary["cells"]
    for level in cell["levels"][:2]:
      for name, mean, std in (
          ("trained", 0.7, 0.01),
          ("untrained", 0.6, 0),
          ("shuffled", 0.65, 0.01),
          ("untrained_shuffled", 0.5, 0),
          ("unseen", 0.5, 0.01),
          ("untrained_unseen", 0.4, 0),
          ("transferred", 0.2, 0.01),
          ("untrained_transferred", 0.3, 0),
      ):
        self.assertAlmostEqual(level[name]["mean"], mean, places=6, msg=name)
        self.assertAlmostEqual(level[name]["std"], std, places=6, msg=name)
    self.assertEqual(set(cell["levels"][2]), {"trained", "untrained"})
    self.assertEqual(summary["mean"][1].keys(), cell["levels"][1].keys())
    self.assertAlmostEqual(summary["mean"][1]["trained"], 0.7, places=6)

  def test_all_latents_count_unused_ones_as_zero(self):
    (cell,) = table1.summarize(_CONFIG, [_result()])["cells"]
    held = [one.activity[1] for one in _hierarchies()]
    fractions = [(h.any(axis=0) & ~h.all(axis=0)).mean() for h in held]
    self.assertLess(min(fractions), 1)
    level = cell["levels"][1]
    self.assertAlmostEqual(
        level["untrained_all"]["mean"], 0.6 * np.mean(fractions), places=6
    )
    unused = np.mean([1 - h.any(axis=0).mean() for h in held])
    self.assertAlmostEqual(cell["unused_fraction"][1]["mean"], unused)

  def test_accuracy_and_loss_are_those_of_the_end(self):
    result = _result()
    (cell,) = table1.summarize(_CONFIG, [result])["cells"]
    self.assertAlmostEqual(cell["accuracy"]["mean"], 0.9, places=6)
    last = result.history.losses[:, 10:].mean()
    self.assertAlmostEqual(cell["loss"]["mean"], last, places=6)

  def test_is_json_and_the_same_each_time(self):
    once = json.dumps(table1.summarize(_CONFIG, [_result()]))
    self.assertEqual(once, json.dumps(table1.summarize(_CONFIG, [_result()])))

  def test_a_single_seed_has_no_spread(self):
    result = _result()
    one = result._replace(
        hierarchies=result.hierarchies[:1],
        history=train.History(
            result.history.losses[:1],
            result.history.accuracy[:1],
            tuple(
                hierarchy_scores.Scores(*(leaf[:1] for leaf in scores))
                for scores in result.history.scores
            ),
        ),
    )
    config = dataclasses.replace(_CONFIG, num_seeds=1)
    (cell,) = table1.summarize(config, [one])["cells"]
    self.assertIsNone(cell["levels"][0]["trained"]["std"])
    figure = table1.draw(table1.summarize(config, [one]))
    self.assertNotEmpty(figure.axes)


class FindingTest(parameterized.TestCase):

  @parameterized.parameters(
      # The score gains .1 and shuffled latents .15.
      ({}, r"\+0.100\), which is no more than what .*\+0.150"),
      ({"shuffled": (0.5, 0.55)}, r"\+0.100\), which is more than what"),
      ({}, "finds the classes first and the latents hardly"),
      ({"transferred": (0.2, 0.3)}, "finds latents that carry over"),
      (
          {"unseen": (0.5, 0.4)},
          "finds the classes rather than their latents",
      ),
      ({"own": (0.6, 0.9)}, "Level 0: training moves the score from 0.600 to"),
  )
  def test_says_what_the_numbers_are(self, changes, expected):
    finding = table1.summarize(_CONFIG, [_result(**changes)])["finding"]
    self.assertRegex(finding, expected)


class LeastLossTest(absltest.TestCase):

  def test_is_what_shared_sequences_leave(self):
    # Classes 0, 1 and 2 are {0, 1}, 3 is {0, 2}: three of four classes have
    # probability 1/3 at best.
    members = (np.array([[0, 1], [0, 1], [0, 1], [0, 2]]),)
    one = data.Hierarchy(4, members)
    self.assertAlmostEqual(table1.least_loss(one), 0.75 * np.log(3), places=12)


if __name__ == "__main__":
  absltest.main()
