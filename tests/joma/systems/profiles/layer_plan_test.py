"""Both rules against all plans there are."""

import itertools

from absl.testing import absltest
import numpy as np

from joma.systems.profiles import layer_plan
from scansnap_jax.experiment import errors


def _problems(num):
  """Overlaps of 2 to 11 layers, and layers that must be full."""
  rng = np.random.default_rng(0)
  for _ in range(num):
    size = int(rng.integers(2, 12))
    # Coarse numbers tie: two plans may have one smallest overlap.
    overlap = np.round(rng.uniform(size=(size, size)), int(rng.integers(1, 4)))
    yield overlap, np.flatnonzero(rng.uniform(size=size) < 0.15), rng


def _all_plans(overlap, sensitive):
  """Of every set of full layers: how many, smallest overlap, and sum."""
  size = len(overlap)
  full = np.array(list(itertools.product((False, True), repeat=size - 1)))
  full = np.insert(full.reshape(-1, size - 1), 0, True, axis=1)
  full = full[full[:, sensitive].all(axis=1)]
  last = np.maximum.accumulate(np.where(full, np.arange(size), 0), axis=1)
  shared = overlap[last, np.arange(size)]
  least = np.where(full, 2.0, shared).min(axis=1)
  return full.sum(axis=1), least, np.where(full, 0.0, shared).sum(axis=1)


def _measured(overlap, full):
  """Smallest overlap, and sum, of one plan."""
  last, shared = 0, []
  for layer in range(len(overlap)):
    last = layer if layer in full else last
    shared += [] if layer in full else [overlap[last, layer]]
  return min(shared, default=2.0), sum(shared)


class LayerPlanTest(absltest.TestCase):

  def test_plans_are_the_best_of_all(self):
    """The twin starts a source only where the one in force is refused."""
    differs = 0
    for overlap, sensitive, rng in _problems(200):
      count, least, total = _all_plans(overlap, sensitive)
      theta = float(rng.uniform())
      plan = layer_plan.fewest(overlap, theta, sensitive.tolist())
      fits = least >= theta
      self.assertLen(plan.full, count[fits].min())
      best = total[fits & (count == len(plan.full))].max()
      self.assertAlmostEqual(plan.total, best)
      smallest, summed = _measured(overlap, plan.full)
      self.assertGreaterEqual(smallest, theta)
      self.assertAlmostEqual(summed, plan.total)
      differs += _greedy(overlap, theta, sensitive)[1] < best - 1e-9
      # The other rule.
      num = int(rng.integers(len({0, *sensitive.tolist()}), len(overlap) + 1))
      plan = layer_plan.widest(overlap, num, sensitive.tolist())
      self.assertLessEqual(len(plan.full), num)
      fits = count <= num
      smallest, summed = _measured(overlap, plan.full)
      self.assertEqual(smallest, least[fits].max())
      best = total[fits & (least == smallest)].max()
      self.assertAlmostEqual(summed, best)
    self.assertGreater(differs, 20)

  def test_layers_that_are_alike_have_one_source(self):
    plan = layer_plan.fewest(np.ones((6, 6)), 1.0)
    self.assertEqual((plan.entry, plan.total), ("0", 5.0))

  def test_more_full_layers_share_no_less(self):
    overlap = np.random.default_rng(1).uniform(size=(9, 9))
    found = [
        _measured(overlap, layer_plan.widest(overlap, num).full)[0]
        for num in range(1, 10)
    ]
    self.assertEqual(found, sorted(found))

  def test_too_few_are_refused(self):
    with self.assertRaisesRegex(errors.UserError, "sensitive layers are 2"):
      layer_plan.widest(np.ones((3, 3)), 1, (2,))


def _greedy(overlap, theta, sensitive):
  full, last, total = [0], 0, 0.0
  for layer in range(1, len(overlap)):
    if overlap[last, layer] < theta or layer in sensitive:
      full, last = [*full, layer], layer
    else:
      total += overlap[last, layer]
  return len(full), total


if __name__ == "__main__":
  absltest.main()
