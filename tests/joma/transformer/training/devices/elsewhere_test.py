"""Runs that go on with another number of devices and on another mesh."""

import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from tests.joma.transformer.training.devices import elsewhere

_FLAG = "--xla_force_host_platform_device_count"


def _part(workdir, mesh, num_devices, end):
  module = "tests.joma.transformer.training.devices.elsewhere"
  flags = f"{_FLAG}={num_devices} --xla_backend_optimization_level=0"
  done = subprocess.run(
      [sys.executable, "-m", module, str(workdir), mesh, str(end)],
      env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
      cwd=pathlib.Path(__file__).parents[5],
      capture_output=True,
      text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return json.loads(done.stdout)


class ElsewhereTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ("numbers", (("8,1,1", 8), ("3,1,1", 3), ("1,1,1", 1), ("4,1,1", 4))),
      ("split_otherwise", (("1,8,1", 8), ("1,2,2", 4))),
      ("to_a_ring_and_copies", (("1,2,1,4", 8), ("pmap", 3), ("1,1,2,3", 6))),
  )
  @pytest.mark.slow
  def test_parameters_are_equal_and_losses_those_of_one_device(self, parts):
    alone = _part(
        self.create_tempdir().full_path, "1,1,1", 1, elsewhere.NUM_STEPS
    )
    workdir, before = self.create_tempdir().full_path, None
    each = elsewhere.NUM_STEPS // len(parts)
    for number, (mesh, num_devices) in enumerate(parts):
      found = _part(workdir, mesh, num_devices, each * (number + 1))
      self.assertEqual(found["devices"], num_devices)
      self.assertEqual(found["start"], each * number)
      if before is not None:
        # Parameters and moments, bit by bit.
        self.assertEqual(found["found"], before["left"], mesh)
      self.assertNotEqual(found["found"], found["left"])
      before = found
    np.testing.assert_allclose(
        before["losses"], alone["losses"], rtol=0, atol=1e-5
    )


if __name__ == "__main__":
  absltest.main()
