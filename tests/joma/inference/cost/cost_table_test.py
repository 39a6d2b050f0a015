"""When eviction pays, by the rows of the table."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized

from joma.inference.cost import cost_table
from joma.inference.cost import cost_table_config
from scansnap_jax.experiment import errors

_CONFIG = cost_table_config.CostTableConfig(chips=("v5p",))


def _rows(**changes):
  found = cost_table.make(dataclasses.replace(_CONFIG, **changes))
  return found, {
      (row["length"], row["batch_size"], row["policy"]): row
      for row in found["rows"]
  }


class CostTableTest(parameterized.TestCase):

  def test_eviction_pays_where_caches_outweigh_weights(self):
    _, rows = _rows(kept=(0.2,))
    verdict = lambda *place: rows[*place, "h2o"]["verdict"]
    self.assertEqual(verdict(8192, 1), "does not pay")
    self.assertEqual(verdict(8192, 8), "pays")
    self.assertEqual(verdict(32_768, 32), "makes it fit")

  def test_speed_up_is_the_ratio_of_the_times(self):
    _, rows = _rows(kept=(0.2,))
    full = rows[8192, 8, "full"]["chips"]["v5p"]
    h2o = rows[8192, 8, "h2o"]["chips"]["v5p"]
    self.assertAlmostEqual(h2o["speed_up"], full["ms"] / h2o["ms"])
    self.assertIsNone(rows[32_768, 32, "h2o"]["chips"]["v5p"]["speed_up"])

  def test_room_for_a_larger_batch_is_more_than_the_shorter_step(self):
    _, rows = _rows(kept=(0.1,), lengths=(32_768,), batch_sizes=(1,))
    chip = rows[32_768, 1, "h2o"]["chips"]["v5p"]
    self.assertLess(chip["speed_up"], 1.3)
    self.assertGreater(chip["throughput_gain"], 5)

  def test_every_policy_has_a_row(self):
    policies = ("window", "h2o", "snapkv", "pyramidkv")
    policies += ("duo_attention", "quest", "deja_vu")
    found, rows = _rows(
        policies=policies, kept=(0.25,), lengths=(4096,), batch_sizes=(1,)
    )
    self.assertLen(found["rows"], 8)
    gb = {policy: rows[4096, 1, policy]["cache_gb"] for policy in policies}
    full = rows[4096, 1, "full"]["cache_gb"]
    # Slots have 8 bytes more than a key and value of 512.
    self.assertAlmostEqual(gb["h2o"], full / 4 * 520 / 512)
    self.assertLess(gb["window"], full / 3)
    self.assertAlmostEqual(gb["pyramidkv"] / gb["h2o"], 1, delta=0.01)
    self.assertBetween(gb["duo_attention"], full / 4, full / 3)
    # Two bounds to 16 keys and values.
    self.assertAlmostEqual(gb["quest"], full * (1 + 1 / 16))
    self.assertEqual(gb["deja_vu"], full)

  def test_a_measured_machine_is_a_chip(self):
    found, rows = _rows(
        chips=(), bandwidth_gbs=10.0, peak_tflops=1.0, memory_gb=64.0
    )
    self.assertEqual([*found["chips"]], ["measured machine"])
    chip = rows[8192, 1, "full"]["chips"]["measured machine"]
    # 15.01 GB of weights, 1.07 of the cache.
    self.assertAlmostEqual(chip["ms"], 1608, delta=1)
    self.assertTrue(chip["fits"])

  @parameterized.parameters(
      (dict(chips=("h1000",)), "h1000.*v5e"),
      (dict(chips=()), "chips"),
      (dict(kept=(0.0,)), r"kept.*\(0, 1\]"),
      (dict(kept=(1e-5,)), "no token"),
      (dict(lengths=(0,)), "lengths"),
      (dict(bandwidth_gbs=1.0), "together"),
      (dict(memory_gb=1.0), "memory_gb"),
      (dict(heads_kept=1.5), "heads_kept"),
  )
  def test_refuses(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      dataclasses.replace(_CONFIG, **changes)


if __name__ == "__main__":
  absltest.main()
