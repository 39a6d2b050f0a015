"""The torus between chips: over how many links a group of devices exchanges.

A chip has two links along each side of the torus. Where a side closes to a ring
a group that spans it uses both; else a chip at its end has one, which the
others wait for. Sides close on v5e and v6e at 16 chips, on the others in slices
whose sides are all multiples of 4
(https://docs.cloud.google.com/tpu/docs/system-architecture-tpu-vm).

GPUs at one switch have no torus: each sends to any others with all it has.

Device numbers go along the first side first, as libtpu hands devices out, and
slice by slice where there are several. What n devices of k slices exchange goes
the way that sends least through the data-centre network: within each slice, and
of each device's part, a (k / n)-th, between slices.
"""

from collections.abc import Sequence
import dataclasses
import functools

import numpy as np

from kernels_pallas.hardware import peaks

_RING_OF_TWO_DIMS = 16
_RING_OF_THREE_DIMS = 4


@dataclasses.dataclass(frozen=True)
class Torus:
  """The chips of a slice, or of several alike.

  Attributes:
    chip: Name of the chip.
    sides: Chips along each side of a slice.
    num_slices: Such slices.
  """

  chip: str
  sides: tuple[int, ...]
  num_slices: int = 1

  @property
  def link_bytes_per_sec(self) -> float:
    """Of one link of a device, or of a GPU's all, one way."""
    peak = peaks.PEAKS[self.chip]
    per_device = peak.ici_bytes_per_sec / peak.num_devices
    return per_device / max(2 * peak.ici_dims, 1)

  @functools.cached_property
  def coordinates(self) -> np.ndarray:
    """Of each device of a slice, one column a side."""
    number = peaks.PEAKS[self.chip].num_devices
    order = tuple(reversed(self.sides))
    places = np.indices(order).reshape(len(order), -1)[::-1].T
    return np.repeat(places, number, axis=0)

  def closes(self, side: int) -> bool:
    """Whether a side is a ring."""
    if len(self.sides) == 2:
      return self.sides[side] == _RING_OF_TWO_DIMS
    return all(size % _RING_OF_THREE_DIMS == 0 for size in self.sides)

  def num_links(self, group: Sequence[int]) -> int:
    """Links of a device over which a group, by numbers, can exchange.

    Devices of one chip, which need none, are taken to have one.
    """
    if not peaks.PEAKS[self.chip].ici_dims:
      return 1
    places = self.coordinates[list(group)]
    links = 0
    for side, size in enumerate(self.sides):
      spanned = len(np.unique(places[:, side]))
      if spanned > 1:
        links += 2 if spanned == size and self.closes(side) else 1
    return max(links, 1)

  def seconds(
      self, sent_bytes: int | float, group: Sequence[int]
  ) -> tuple[float, float]:
    """Least times in which each device of a group sends so many bytes.

    Args:
      sent_bytes: That a device sends in a ring of the whole group.
      group: Numbers of the devices, over all slices.

    Returns:
      Seconds of links within slices, and of the network between them.
    """
    numbers = np.unique(np.asarray(group))
    per_slice = len(self.coordinates)
    slices = np.unique(numbers // per_slice)
    inner = numbers[numbers // per_slice == slices[0]] % per_slice
    size, across, within = len(numbers), len(slices), len(inner)
    # What a ring of n sends is (n - 1) / n of what it gathers or sums.
    whole = sent_bytes * size / max(size - 1, 1)
    inside = whole * (within - 1) / within
    if across == 1:
      inside = sent_bytes
    links = self.num_links(inner.tolist()) * self.link_bytes_per_sec
    peak = peaks.PEAKS[self.chip]
    between = whole / within * (across - 1) / across
    network = peak.dcn_bytes_per_sec / peak.num_devices
    return inside / links, between / network if across > 1 else 0.0
