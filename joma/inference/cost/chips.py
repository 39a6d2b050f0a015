"""Memory, bandwidth and arithmetic of the chips that inference is planned for.

Those of one whole chip are in `kernels_pallas.hardware.peaks`. Imports no jax.
"""

import dataclasses

from kernels_pallas.hardware import peaks
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

Number = int | float


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


CHIPS: dict[str, Chip] = {
    name: Chip(
        name=name,
        hbm_bytes=peak.hbm_bytes,
        bytes_per_sec=peak.bytes_per_sec,
        flops_per_sec=peak.flops_per_sec,
        source=peak.source,
    )
    for name, peak in peaks.PEAKS.items()
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
