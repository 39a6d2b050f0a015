"""The chips that kernels are compiled for, and what each can do.

A device is what JAX calls one: a whole chip where two TensorCores work as one
(v4, v5p: megacore), one of the two TensorCores of a v7x chip. Its peak rates
and HBM are its share of `peaks`, VMEM and scalar memory those of
`pltpu.get_tpu_info_for_chip`.
"""

import dataclasses
import functools
from typing import Any, Literal

from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.hardware import peaks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """A device and its limits.

  Attributes:
    name: One of `CHIP_NAMES`.
    platform: Whose compiler.
    num_cores: TensorCores of a device, or streaming multiprocessors.
    clock_hz: Cycles per second, for times of static schedules. Derived for
      TPUs: the clock at which the multiply-accumulates of a core, 4 * 128^2 a
      cycle until v5 and 4 * 256^2 from v6e on, give the peak rate.
    bf16_flops_per_sec: Peak of all cores of the device.
    hbm_bytes_per_sec: Peak of the device.
    hbm_bytes: Of the device.
    vmem_bytes: Of one core; 0 on a GPU.
    smem_bytes: Scalar memory of one TensorCore, shared memory of one GPU block.
    scoped_vmem_bytes: What a kernel gets unless it sets `vmem_limit_bytes`.
    branch_delay: Bundles after a branch that are executed whether it is taken
      or not, as the schedules show.
    copy_bytes: Unit of the sizes and places of copies in the schedules.
    hbm_unit_bytes: Unit of places in HBM there.
  """

  name: str
  platform: Literal["tpu", "cuda"]
  num_cores: int
  clock_hz: float
  bf16_flops_per_sec: float
  hbm_bytes_per_sec: float
  hbm_bytes: int
  vmem_bytes: int
  smem_bytes: int
  scoped_vmem_bytes: int = 0
  branch_delay: int = 0
  copy_bytes: int = 0
  hbm_unit_bytes: int = 0


# Version, cores of a device, clock, MiB of scoped VMEM, delay slots, and units
# of copies and of HBM in bytes.
_TPUS = {
    "v4": (pltpu.ChipVersion.TPU_V4, 2, 1.05e9, 16, 1, 512, 512),
    "v5e": (pltpu.ChipVersion.TPU_V5E, 1, 1.5e9, 16, 4, 32, 512),
    "v5p": (pltpu.ChipVersion.TPU_V5P, 2, 1.75e9, 16, 4, 32, 32),
    "v6e": (pltpu.ChipVersion.TPU_V6E, 1, 1.75e9, 32, 4, 32, 32),
    "v7x": (pltpu.ChipVersion.TPU_7X, 1, 2.2e9, 32, 6, 32, 32),
}
_SPELLINGS = {"7x": "v7x", "tpu7x": "v7x"}
TPU_NAMES: tuple[str, ...] = tuple(_TPUS)
CHIP_NAMES: tuple[str, ...] = (*TPU_NAMES, "h100")


@functools.cache
def get_chip(name: str) -> Chip:
  """Returns the chip of this name; "7x" and "tpu7x" are v7x.

  Raises:
    ValueError: If there is none.
  """
  name = _SPELLINGS.get(name, name)
  if name == "h100":
    return _H100
  if name not in _TPUS:
    raise ValueError(f"no chip {name!r}; known are {', '.join(CHIP_NAMES)}")
  version, num_cores, clock_hz, scoped_mib, delay, copy, hbm = _TPUS[name]
  core = pltpu.get_tpu_info_for_chip(version, num_cores)
  return Chip(
      name=name,
      platform="tpu",
      num_cores=num_cores,
      clock_hz=clock_hz,
      **_rates(name),
      vmem_bytes=core.vmem_capacity_bytes,
      smem_bytes=core.smem_capacity_bytes,
      scoped_vmem_bytes=scoped_mib << 20,
      branch_delay=delay,
      copy_bytes=copy,
      hbm_unit_bytes=hbm,
  )


def _rates(name: str) -> dict[str, Any]:
  """A device's share of its chip's peaks."""
  peak = peaks.PEAKS[name]
  return {
      "bf16_flops_per_sec": peak.flops_per_sec / peak.num_devices,
      "hbm_bytes_per_sec": peak.bytes_per_sec / peak.num_devices,
      "hbm_bytes": peak.hbm_bytes // peak.num_devices,
  }


# The SXM board, NVIDIA's data sheet: dense bf16, boost clock.
_H100 = Chip(
    name="h100",
    platform="cuda",
    num_cores=132,
    clock_hz=1.98e9,
    **_rates("h100"),
    vmem_bytes=0,
    smem_bytes=227 << 10,
)
