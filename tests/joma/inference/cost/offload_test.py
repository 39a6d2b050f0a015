"""Placements: bytes and times by hand, and the search beside enumeration."""

import dataclasses
import itertools

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from joma.inference.cost import cache_plan
from joma.inference.cost import chips
from joma.inference.cost import cost_model
from joma.inference.cost import cost_table_config
from joma.inference.cost import offload
from scansnap_jax.experiment import errors

_WORK = offload.Work(
    num_layers=4,
    fixed_bytes=50,
    layer_bytes=100,
    cache_bytes=40,
    page_bytes=10,
    read_bytes=30,
    written_bytes=5,
    stream_bytes=2,
    working_bytes=6,
    step_bytes=440,
    flops=1000,
)


def _machine(hbm=10**4, host=10**4, link=10.0, bandwidth=100.0, flops=1e3):
  chip = chips.Chip(
      name="made up",
      hbm_bytes=hbm,
      bytes_per_sec=bandwidth,
      flops_per_sec=flops,
      source="made up",
  )
  return offload.Machine(chip=chip, host_bytes=host, link_bytes_per_sec=link)


def _place(k, j, stream, batch):
  return offload.Placement(
      host_weights=k, host_cache=j, host_stream=stream, batch_size=batch
  )


def _enumerated(work, machine, most):
  """Tokens per second of the best of all placements and batches."""
  layers = range(work.num_layers + 1)
  best = 0.0
  for where in itertools.product(
      layers, layers, (False, True), range(1, most + 1)
  ):
    found = offload.of_placement(work, machine, _place(*where))
    if offload.fits(found, machine):
      best = max(best, found.tokens_per_sec)
  return best


class PlacementTest(parameterized.TestCase):

  def test_bytes_and_times_by_hand(self):
    """3 sequences, weights of 3 layers and caches of 2 in the host."""
    found = offload.of_placement(_WORK, _machine(), _place(3, 2, True, 3))
    # 50 fixed, one layer, two buffers; caches of 2 layers, 4 pages, streams.
    self.assertEqual(
        found.device_bytes, 50 + 100 + 200 + 3 * (2 * 40 + 40 + 2 + 6)
    )
    self.assertEqual(found.host_bytes, 300 + 3 * (80 + 2))
    up = 300 + 3 * (60 + 4 * 2)
    self.assertEqual(found.seconds["transfer"], up / 10)
    self.assertEqual(found.seconds["memory"], (440 + 3 * 4 * 30 + up) / 100)
    self.assertEqual(found.seconds["arithmetic"], 3.0)
    self.assertEqual(found.bound, "transfer")
    self.assertEqual(found.tokens_per_sec, 3 / (up / 10))
    fast = _machine(link=1e4, flops=10.0)
    found = offload.of_placement(_WORK, fast, _place(3, 2, True, 3))
    self.assertEqual((found.bound, found.step_seconds), ("arithmetic", 300))
    # On the chip: nothing is buffered, nothing goes over the link.
    found = offload.of_placement(_WORK, _machine(), _place(0, 0, False, 2))
    self.assertEqual(found.device_bytes, 450 + 2 * (160 + 2 + 6 + 2))
    self.assertEqual((found.host_bytes, found.seconds["transfer"]), (0, 0))

  def test_the_numbers_of_a_model_are_the_cost_models(self):
    config = cost_table_config.llama32_1b()
    load = cost_model.Load(batch_size=7, length=512)
    plan = cache_plan.full()
    work = offload.work_of(config, load, plan, 64)
    one = dataclasses.replace(load, batch_size=1)
    step = cost_model.decode(config, one, plan)
    cache = cost_model.cache_bytes(config, one, plan)
    self.assertEqual(
        work.fixed_bytes + 16 * work.layer_bytes,
        cost_model.memory_bytes(config, one, plan) - cache,
    )
    self.assertEqual(16 * work.cache_bytes, cache)
    self.assertEqual(8 * work.page_bytes, work.cache_bytes)
    self.assertEqual(work.flops, step.flops)
    self.assertEqual(16 * work.read_bytes, step.cache_bytes)
    # A page of 64 keys and values of 8 heads of 64, 2 bytes each.
    self.assertEqual(work.written_bytes, 64 * 2 * 8 * 64 * 2)

  def test_a_machine_without_a_known_memory_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "memory must be known"):
      _machine(hbm=None)


class SearchTest(parameterized.TestCase):

  @parameterized.parameters(*range(4))
  @pytest.mark.by_default(0)
  def test_the_optimum_is_that_of_enumeration(self, part):
    """100 machines and models at random, in four parts."""
    draw = np.random.default_rng(part)
    number = lambda low, high: int(np.exp(draw.uniform(*np.log([low, high]))))
    bounds, fitting = set(), 0
    for _ in range(25):
      fields = {
          field.name: number(1, 400) for field in dataclasses.fields(_WORK)
      }
      work = offload.Work(**{**fields, "num_layers": int(draw.integers(1, 5))})
      machine = _machine(
          hbm=number(200, 8000),
          host=number(50, 8000),
          link=float(number(5, 500)),
          bandwidth=float(number(50, 3000)),
          flops=float(number(50, 3000)),
      )
      most = int(draw.integers(1, 12))
      want = _enumerated(work, machine, most)
      found = offload.search(work, machine, most)
      self.assertEqual(found is None, want == 0)
      if found is not None:
        self.assertAlmostEqual(found.tokens_per_sec, want, delta=1e-12 * want)
        self.assertTrue(offload.fits(found, machine))
        bounds.add(found.bound)
        fitting += 1
    self.assertGreater(fitting, 12)
    self.assertGreater(len(bounds), 1)

  def test_the_largest_batch_is_the_last_that_fits(self):
    machine = _machine(hbm=1000, host=500)
    for where in ((0, 0, False), (2, 1, True), (4, 4, False)):
      most = offload.largest_batch(_WORK, machine, _place(*where, 1), 1000)
      fits = lambda batch, where=where: offload.fits(
          offload.of_placement(_WORK, machine, _place(*where, batch)), machine
      )
      self.assertTrue(fits(most))
      self.assertFalse(fits(most + 1))
    self.assertEqual(
        offload.largest_batch(
            _WORK, _machine(hbm=100), _place(0, 0, False, 1), 9
        ),
        0,
    )

  def test_a_tie_leaves_most_on_the_chip(self):
    """Arithmetic bounds all placements alike."""
    machine = _machine(link=1e9, bandwidth=1e9, flops=1.0)
    found = offload.search(_WORK, machine, 3)
    self.assertEqual(found.placement, _place(0, 0, False, 3))
    # What may not lie in the host does not.
    tight = _machine(hbm=560, host=10**4)
    self.assertIsNone(
        offload.search(
            _WORK, tight, 3, host_weights=False, host_stream=False,
            host_cache=False,
        )
    )  # fmt: skip
    self.assertIsNotNone(offload.search(_WORK, tight, 3))


if __name__ == "__main__":
  absltest.main()
