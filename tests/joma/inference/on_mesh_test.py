import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax.sharding import PartitionSpec as P
import pytest

from joma.inference import on_mesh
from joma.transformer import config as configs
from joma.transformer import sharding
from scansnap_jax.experiment import errors
from scansnap_jax.experiment.processes import mesh_config
from tests.joma.inference import on_eight

_CONFIG = configs.TransformerConfig(num_heads=8, num_kv_heads=4)


class CheckTest(parameterized.TestCase):

  def _said(self, sizes, batch_size=4):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
      on_mesh.check(sizes, _CONFIG, batch_size)
    return said.getvalue()

  def test_what_divides_is_not_talked_about(self):
    self.assertEqual(self._said(None), "")
    self.assertEqual(self._said((2, 2, 4, 3)), "")

  def test_key_heads_that_do_not_divide_are_named(self):
    said = self._said((1, 1, 3, 1))
    self.assertRegex(said, "tensor=3 .* 4 key heads.* 1, 2, 4 would split it")

  def test_sequences_that_do_not_divide_are_refused(self):
    with self.assertRaisesRegex(
        errors.UserError, "mesh=3,1,1,1: .* 3 devices .* 4 seq.*1, 2, 4 would"
    ):
      self._said((3, 1, 1, 1))

  def test_devices_that_are_not_there_are_refused(self):
    devices = jax.devices()[:1] * 4
    with self.assertRaisesRegex(errors.UserError, "mesh=1,1,2,1 is of 2"):
      with on_mesh.of_sizes((1, 1, 2, 1), devices):
        pass

  @parameterized.parameters("2", "1,2", "1,2,0", "1,2,a", "1,2,3,4,5")
  def test_what_is_no_mesh_is_refused(self, text):
    with self.assertRaisesRegex(errors.UserError, "must be numbers from 1"):
      mesh_config.sizes_of(text)

  def test_seq_may_be_left_out(self):
    self.assertEqual(mesh_config.sizes_of("1,2,3"), (1, 2, 3, 1))


class CacheSpecTest(parameterized.TestCase):

  @parameterized.parameters(
      # Keys, positions, a score of sequences alone, a number.
      ((4, 2, 16, 8), P(("data", "fsdp"), "tensor", None, None)),
      ((4, 2, 16), P(("data", "fsdp"), "tensor", None)),
      ((4,), P(("data", "fsdp"))),
      ((), P()),
      # Of other first axes.
      ((16, 2), P(None, "tensor")),
      ((3, 7), P(None, None)),
  )
  def test_sequences_and_key_heads_are_split(self, shape, expected):
    mesh = jax.sharding.AbstractMesh((2, 1, 2, 1), sharding.AXES)
    self.assertEqual(sharding.cache_spec(shape, mesh, 4, 2), expected)
    # Of three heads or sequences nothing is split.
    whole = sharding.cache_spec((3, 3, 16), mesh, 3, 3)
    self.assertEqual(whole, P(None, None, None))


class EightDevicesTest(absltest.TestCase):

  @pytest.mark.slow
  def test_tokens_and_kept_slots_are_those_of_one_device(self):
    flags = (
        "--xla_force_host_platform_device_count=8"
        " --xla_backend_optimization_level=0"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.joma.inference.on_eight"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=pathlib.Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    self.assertEqual(done.returncode, 0, done.stderr[-4000:])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    policies = [row for row in rows if "policy" in row]
    self.assertLen(policies, len(on_eight.MESHES) * len(on_eight.POLICIES))
    for row in policies:
      self.assertTrue(row["is_equal"], row)
      self.assertGreater(row["num_tokens"], 20)  # No text that repeats.
    exchanged = [row for row in rows if "exchanges" in row]
    self.assertLen(exchanged, len(on_eight.MESHES))
    for row in exchanged:
      self.assertGreater(row["exchanges"], 0)
      # Each key head keeps and evicts for itself, where tensor divides them.
      if row["mesh"] != "1,1,8,1":
        self.assertEqual(row["of_cache"], 0, row)


if __name__ == "__main__":
  absltest.main()
