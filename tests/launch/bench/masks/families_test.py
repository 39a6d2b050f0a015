"""Pairs, tiles and FLOPs of every mask family, by brute force."""

from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from kernels_pallas import masks
from kernels_pallas.attention import cost
from kernels_pallas.attention import shapes
from launch.bench import kernels
from launch.bench.masks import families
from launch.bench.masks import report
from scansnap_jax.experiment import errors

_LONG = 3000  # No multiple of a tile.


def _allowed(mask, length):
  """[T, T], from the definition of a mask alone."""
  keys = np.arange(length)
  seen = np.zeros((length, length), bool)
  for start, stop in zip(mask.starts, mask.stops, strict=True):
    seen |= (keys >= start[:, None]) & (keys < stop[:, None])
  if mask.query_ids is not None:
    seen &= mask.query_ids[:, None] == mask.key_ids[None]
  return seen


class FamiliesTest(parameterized.TestCase):

  def test_there_are_twelve_and_two_in_both_forms(self):
    both = {"document", "sliding window"}
    names = {name.removesuffix(", causal") for name in families.FAMILIES}
    self.assertLen(names, 12)
    self.assertLen(families.FAMILIES, 12 + len(both))

  @parameterized.parameters(*families.FAMILIES)
  def test_pairs_and_tiles_are_those_that_are_counted(self, family):
    for length in (*range(1, 41), _LONG):
      mask = families.FAMILIES[family](length)
      seen = _allowed(mask, length)
      self.assertEqual(families.num_pairs(mask), seen.sum(), length)
      block = families.BLOCK if length == _LONG else 4
      tiles = families.tiles_of(mask, length, block)
      fill = -length % block
      padded, real = (
          np.pad(x, ((0, fill), (0, fill))) for x in (seen, seen | True)
      )
      num = len(padded) // block
      cut, there = (
          x.reshape(num, block, num, block).sum(axis=(1, 3))
          for x in (padded, real)
      )
      # Never full where a pair is forbidden, never empty where one is allowed.
      self.assertLessEqual(tiles.full, (cut == there).sum())
      self.assertGreaterEqual(tiles.visited, (cut > 0).sum())
      if mask.query_ids is None:
        self.assertGreaterEqual(tiles.full, (cut == block**2).sum())
      if mask.query_ids is None and len(mask.starts) == 1:
        self.assertEqual(tiles.visited, (cut > 0).sum())

  @parameterized.parameters("causal", "hash sparse")
  def test_flops_are_those_of_the_pairs(self, family):
    facts = report.facts_of(family, 96, "flash", 64, 32)
    pairs = _allowed(families.FAMILIES[family](96), 96).sum()
    self.assertEqual(facts["gflops"] * 1e9, 4 * 64 * pairs)
    self.assertEqual(facts["backward_gflops"], 2.5 * facts["gflops"])
    shape = shapes.square(96, 1, 1, 64)
    if family == "causal":
      self.assertEqual(cost.num_pairs(masks.causal(96), shape), pairs)

  def test_the_ratio_is_of_a_pair(self):
    rows = [
        {"family": "causal", "op": "flash", "pairs": 10, "seconds": 5.0},
        {"family": "full", "op": "flash", "pairs": 20, "seconds": 20.0},
        {"family": "full", "op": "block-sparse", "pairs": 20},
    ]
    found = report.with_ratios(rows, "seconds")
    self.assertEqual([row.get("per_pair") for row in found], [1.0, 2.0, None])

  @pytest.mark.slow
  def test_rows_of_a_cpu(self):
    two = {name: families.FAMILIES[name] for name in ("causal", "document")}
    with mock.patch.object(families, "FAMILIES", two):
      rows = report.cpu_rows(16, num_times=1)
    self.assertLen(rows, 4)
    for row in rows:
      self.assertGreater(row["per_pair"], 0)

  def test_other_targets_are_refused(self):
    with self.assertRaisesRegex(errors.UserError, "cpu and tpu:CHIP, got gpu"):
      kernels.measure_masks("gpu", [1024])


if __name__ == "__main__":
  absltest.main()
