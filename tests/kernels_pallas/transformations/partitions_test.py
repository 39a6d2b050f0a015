import json
import os
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import masks
from kernels_pallas import selection
from kernels_pallas.transformations import partitions


class LabelsTest(absltest.TestCase):

  def test_of_what_may_be_attended_to(self):
    lengths = jnp.array([3, 4])
    of = lambda where: partitions.of_where(where, (2, 4, 2))
    self.assertEqual(of(None), [])
    self.assertEqual(of(masks.causal(8)), [])
    self.assertEqual(of(masks.key_lengths(8, lengths))[-1], "b..")
    table = jnp.zeros((2, 4, 1, 3), jnp.int32)
    chosen = selection.Selection(table, table[..., 0], masks.causal(8), 8, 8)
    self.assertEqual(of(chosen), ["bn..", "bn."])
    chosen = selection.Selection(table[:, :2], table[:1, :1, :, 0], None, 8, 8)
    self.assertEqual(of(chosen), ["bk..", "..."])

  def test_what_is_known_of_each_sequence_is_not_split(self):
    lengths = np.array([3, 4])
    mask = masks.key_lengths(8, lengths)
    self.assertIsNone(partitions.of_where(mask, (2, 4, 2)))
    self.assertEqual(partitions.of_where(mask, (1, 4, 2)), [])


class SplitTest(parameterized.TestCase):

  @parameterized.parameters("xla", "pallas_tpu")
  @pytest.mark.slow
  def test_four_devices_gather_nothing(self, implementation):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    module = "tests.kernels_pallas.transformations.partitioned"
    done = subprocess.run(
        [sys.executable, "-m", module, implementation],
        env=environment,
        capture_output=True,
        text=True,
    )
    self.assertEqual(done.returncode, 0, done.stderr[-4000:])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    self.assertLen(rows, 10)
    for row in rows:
      op = row.pop("op"), row.pop("kv_heads")
      self.assertLess(row.pop("error"), 1e-5, op)
      # One key head: its gradient is a sum over devices. Decoding shares it.
      summed = ("gradients", "linear", "delta")
      is_summed = op[1] == 1 and op[0] in summed
      if op == ("decode", 1):
        continue
      row.pop("all-reduce") if is_summed else None
      self.assertEqual(set(row.values()), {0}, (op, row))


if __name__ == "__main__":
  absltest.main()
