import os
import subprocess
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from kernels_pallas.aot import chips
from kernels_pallas.aot import topology


class DeviceMeshTest(parameterized.TestCase):

  @parameterized.parameters("tpu", "cuda")
  def test_without_a_compiler_it_says_what_to_install(self, platform):
    chip = chips.get_chip({"tpu": "v6e", "cuda": "h100"}[platform])
    with mock.patch.object(topology.importlib.util, "find_spec") as find:
      find.return_value = None
      with self.assertRaisesRegex(topology.ToolchainMissing, "pip install"):
        topology.device_mesh.__wrapped__(chip)

  @pytest.mark.slow
  def test_importing_loads_no_compiler_and_leaves_the_environment(self):
    code = """
import os, sys
before = dict(os.environ)
from kernels_pallas.aot import compile, jobs, ptx, schedule
assert dict(os.environ) == before
assert "libtpu" not in sys.modules
assert "libtpu" not in open("/proc/self/maps").read()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


_COMPILE_TWICE = """
import sys, warnings
import jax
from kernels_pallas.aot import compile
warnings.simplefilter("error")
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
x = jax.ShapeDtypeStruct((8,), "float32")
for _ in range(2):
  compile.compile_for("v5e", jax.numpy.sin, x)
  jax.clear_caches()
assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.0
"""


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompiledTest(absltest.TestCase):

  @pytest.mark.slow
  def test_with_a_cache_on_disk_a_program_compiles_a_second_time(self):
    folder = self.create_tempdir().full_path
    command = [sys.executable, "-c", _COMPILE_TWICE, folder]
    subprocess.run(command, check=True)


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class TpuMeshTest(parameterized.TestCase):

  @parameterized.product(name=chips.TPU_NAMES, num_devices=(1, 8, 64))
  def test_has_devices_of_the_kind(self, name, num_devices):
    chip = chips.get_chip(name)
    devices = topology.device_mesh(chip, num_devices).devices
    self.assertEqual(devices.shape, (num_devices,))
    kind = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
    kind |= {"v4": "TPU v4", "v7x": "TPU7x"}
    self.assertEqual({d.device_kind for d in devices}, {kind[name]})
    self.assertEqual({d.num_cores for d in devices}, {chip.num_cores})

  def test_part_of_a_topology_is_refused(self):
    with self.assertRaisesRegex(ValueError, r"3 v5e devices; sizes are 1, \[4"):
      topology.device_mesh(chips.get_chip("v5e"), 3)

  def test_the_environment_is_as_before(self):
    names = topology._ENVIRONMENT["tpu"]
    before = {k: v for k, v in os.environ.items() if k not in names}
    with mock.patch.dict(os.environ, before, clear=True):
      topology.device_mesh.__wrapped__(chips.get_chip("v5e"))
      self.assertNoCommonElements(os.environ, names)


@absltest.skipUnless(
    topology.has_toolchain("cuda"), "no CUDA plugin for this jax"
)
class GpuMeshTest(absltest.TestCase):

  def test_has_the_device(self):
    (device,) = topology.device_mesh(chips.get_chip("h100")).devices
    self.assertEqual(device.device_kind, "NVIDIA H100 80GB HBM3")


if __name__ == "__main__":
  absltest.main()
