"""Devices that are described rather than present, to compile for.

libtpu and the CUDA plugin both compile without a device. Importing this module
loads neither; the first mesh of a platform does.
"""

from collections.abc import Iterator
import contextlib
import functools
import importlib.util
import math
import os

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
import numpy as np

from kernels_pallas.aot import chips

# libtpu else asks a metadata server where it is, and locks out any second
# process; the plugin else refuses to load where there is no driver.
_ENVIRONMENT = {
    "tpu": {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    "cuda": {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
}
_HOW_TO_INSTALL = {
    "tpu": "libtpu is not installed: pip install 'jax[tpu]'",
    "cuda": (
        "compiling for GPUs needs jax >= 0.11 and its CUDA plugin: pip install"
        " --no-deps jax-cuda13-plugin jax-cuda13-pjrt"
    ),
}
_GPUS = ("h100", "h200")
# Shapes by the number of chips, in two dimensions and in three.
_TORI = {
    4: ("2x2", "2x2x1"),
    8: ("2x4", "2x2x2"),
    16: ("4x4", "2x2x4"),
    32: ("4x8", "2x4x4"),
    64: ("8x8", "4x4x4"),
    128: ("8x16", "4x4x8"),
    256: ("16x16", "4x8x8"),
}
# The fields of XLA's GpuTargetConfigProto; NVIDIA's H100 SXM data.
_H100_TARGET = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 12 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
}
"""


class ToolchainMissing(RuntimeError):
  """A compiler, or a report that it is asked for, is not there."""


def has_toolchain(platform: str) -> bool:
  """Whether what compiles for "tpu" or "cuda" is installed; loads nothing."""
  if platform == "tpu":
    return importlib.util.find_spec("libtpu") is not None
  plugin = importlib.util.find_spec("jax_cuda13_plugin")
  return plugin is not None and jax.__version_info__ >= (0, 11)


def require(platform: str) -> None:
  """Raises ToolchainMissing, with what to install, unless it is there."""
  if not has_toolchain(platform):
    raise ToolchainMissing(_HOW_TO_INSTALL[platform])


@functools.cache
def device_mesh(chip: chips.Chip, num_devices: int = 1) -> Mesh:
  """Returns a mesh, with one axis named device, of devices of this kind.

  Args:
    chip: The kind of device.
    num_devices: One, or as many as some whole topology has: on some chips XLA
      refuses part of one.

  Raises:
    ToolchainMissing: If what compiles for the chip is not installed.
    ValueError: If no topology has that many devices.
  """
  require(chip.platform)
  with _environment(_ENVIRONMENT[chip.platform]):
    if chip.platform == "cuda":
      devices = _h100_devices(num_devices)
    else:
      devices = _tpu_devices(chip.name, num_devices)
  whole = devices[:1] if num_devices == 1 else devices
  return Mesh(np.array(whole), ("device",))


def named_devices(
    name: str, num_slices: int = 1
) -> tuple[chips.Chip, list[jax.Device]]:
  """Returns the kind of device and all devices of a topology.

  Args:
    name: A chip and the chips along each side of its torus, as "v5p:4x4x4" or
      "v5e:16x16"; or GPUs of one machine, as "h100:8". An H200, an H100 with
      more memory, is compiled for as one.
    num_slices: Such slices, connected by the data-centre network; their
      devices come slice by slice.

  Raises:
    ToolchainMissing: If what compiles for the chip is not installed.
    ValueError: If there is no such chip or torus.
  """
  kind, _, torus = name.partition(":")
  if kind in _GPUS and torus.isdecimal():
    require("cuda")
    with _environment(_ENVIRONMENT["cuda"]):
      return chips.get_chip("h100"), _h100_devices(int(torus))
  chip = chips.get_chip(kind)
  if chip.platform != "tpu":
    known = ", ".join((*chips.TPU_NAMES, *_GPUS))
    raise ValueError(f"{name}: topologies are of {known}")
  require("tpu")
  with _environment(_ENVIRONMENT["tpu"]):
    try:
      return chip, _of_torus(chip.name, torus, num_slices)
    except Exception as error:
      raise ValueError(f"{name} is no topology: {error}") from error


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  """Compiles for devices that are described.

  jax writes such a program into the cache on disk, if there is one, and cannot
  read it again: it is kept out of it.
  """
  name = "jax_persistent_cache_min_compile_time_secs"
  before = getattr(jax.config, name)
  jax.config.update(name, math.inf)
  try:
    return lowered.compile()
  finally:
    jax.config.update(name, before)


def _of_torus(name: str, torus: str, num_slices: int = 1) -> list[jax.Device]:
  return topologies.get_topology_desc(
      platform="tpu",
      topology_name=f"{'tpu7x' if name == 'v7x' else name}:{torus}",
      **({"chip_config_name": "megacore"} if name == "v4" else {}),
      **({"num_slices": num_slices} if num_slices > 1 else {}),
      # A host has four chips, unless it is told of one.
      **({"chips_per_host_bounds": (1, 1, 1)} if set(torus) <= {*"1x"} else {}),
  ).devices


def _tpu_devices(name: str, num_devices: int) -> list[jax.Device]:
  # Topologies are named by chips; a v7x chip is two devices.
  devices_per_chip = 2 if name == "v7x" else 1
  sizes = {devices_per_chip * n: tori for n, tori in _TORI.items()}
  if num_devices != 1 and num_devices not in sizes:
    raise ValueError(f"{num_devices} {name} devices; sizes are 1, {[*sizes]}")
  flat, cube = sizes.get(num_devices, _TORI[4])
  torus = flat if name in ("v5e", "v6e") else cube
  return _of_torus(name, torus)


def _h100_devices(num_devices: int) -> list[jax.Device]:
  return topologies.get_topology_desc(
      platform="cuda",
      topology_name="h100",
      target_config=_H100_TARGET,
      topology=f"1x1x{num_devices}",
  ).devices


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
  """Sets what is not set, for as long as a compiler is being loaded."""
  added = {k: v for k, v in variables.items() if k not in os.environ}
  os.environ.update(added)
  try:
    yield
  finally:
    for name in added:
      del os.environ[name]
