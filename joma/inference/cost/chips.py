"""Memory, bandwidth and arithmetic of the chips that inference is planned for.

Vendors' figures of one whole chip, peaks that no program quite reaches. Imports
no jax. For kernels, `kernels_pallas.aot.chips` has jax's own table: it counts
devices (one of two cores of v7x) and gives v5p 11 % less bandwidth.
"""

import dataclasses

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

Number = int | float
_GB = 10**9
_GIB = 2**30
_TPU = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """A chip, or a machine of which the same three numbers are known.

  Attributes:
    name: In tables.
    hbm_bytes: Of its main memory; None is not known.
    bytes_per_sec: From and to that memory, at most.
    flops_per_sec: Dense matrix products in bfloat16, at most.
    source: Where the figures are from.
  """

  name: str
  hbm_bytes: Number | None
  bytes_per_sec: Number
  flops_per_sec: Number
  source: str

  def seconds(self, num_bytes: Number, flops: Number) -> float:
    """Least time (s): the slower of memory and arithmetic."""
    return max(num_bytes / self.bytes_per_sec, flops / self.flops_per_sec)

  def fits(self, num_bytes: Number) -> bool:
    """Whether so many bytes fit; True where the memory is not known."""
    return self.hbm_bytes is None or num_bytes <= self.hbm_bytes


def _chip(
    name: str, hbm_bytes: int, gb_per_sec: int, tflops: int, source: str
) -> Chip:
  return Chip(
      name=name,
      hbm_bytes=hbm_bytes,
      bytes_per_sec=gb_per_sec * _GB,
      flops_per_sec=tflops * 1000 * _GB,
      source=source,
  )


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        # GB or GiB as the pages have it.
        _chip("v4", 32 * _GIB, 1228, 275, _TPU + "v4"),
        _chip("v5e", 16 * _GB, 819, 197, _TPU + "v5e"),
        _chip("v5p", 95 * _GIB, 2765, 459, _TPU + "tpu7x"),
        _chip("v6e", 32 * _GIB, 1638, 918, _TPU + "tpu7x"),
        _chip("v7x", 192 * _GIB, 7380, 2307, _TPU + "tpu7x"),
        # SXM boards.
        _chip("a100", 80 * _GB, 2039, 312, _NVIDIA + "a100/"),
        _chip("h100", 80 * _GB, 3350, 989, _NVIDIA + "h100/"),
        _chip("h200", 141 * _GB, 4800, 989, _NVIDIA + "h200/"),
    )
}


def get(name: str) -> Chip:
  """Returns the chip of this name.

  Raises:
    UserError: There is none.
  """
  if name not in CHIPS:
    raise errors.UserError(
        f"chip={name} is none of {', '.join(CHIPS)}; give --bandwidth_gbs and"
        " --peak_tflops for another machine."
    )
  return CHIPS[name]


def measured(
    bandwidth_gbs: Number,
    peak_tflops: Number,
    memory_gb: Number | None = None,
) -> Chip:
  """A machine whose figures were measured on it.

  Args:
    bandwidth_gbs: 10^9 bytes per second.
    peak_tflops: 10^12 operations per second.
    memory_gb: 10^9 bytes; None is not known.

  Raises:
    UserError: A figure is not positive and finite.
  """
  require.positive("bandwidth_gbs", bandwidth_gbs)
  require.positive("peak_tflops", peak_tflops)
  if memory_gb is not None:
    require.positive("memory_gb", memory_gb)
  return Chip(
      name="measured machine",
      hbm_bytes=None if memory_gb is None else memory_gb * 1e9,
      bytes_per_sec=bandwidth_gbs * 1e9,
      flops_per_sec=peak_tflops * 1e12,
      source="given",
  )
