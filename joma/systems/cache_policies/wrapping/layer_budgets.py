"""Layers get numbers of slots by a curve, whichever policy fills them."""

import dataclasses
import itertools
from typing import ClassVar

from joma.systems.cache_policies.wrapping import wrapper
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerBudgets(wrapper.Bare):
  """A curve of budgets over layers, for any policy (as PyramidKV, 2406.02069).

  The largest layer has `ratio` times the slots of the smallest, the others lie
  on a line: falling with depth, rising, or from both ends to the middle. Or
  `shares` says each layer's part. The mean is the capacity, and no layer has
  fewer slots than are protected and one.

  Paper's settings: PyramidKV's beta of 20, over layers from many slots to few.

  Attributes:
    curve: Which line.
    ratio: From 1, where all layers have the same.
    shares: Of the layers, in any unit; () is what the curve says.
  """

  label: ClassVar[str] = "By layer"
  wants_attention: ClassVar[bool] = False
  curve: str = "falling"
  ratio: float = 4.0
  shares: tuple[float, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    if self.curve not in ("falling", "rising", "ends"):
      raise errors.UserError(
          f"curve={self.curve} must be falling, rising or ends."
      )
    if not self.ratio >= 1:
      raise errors.UserError(f"ratio={self.ratio} must be at least 1.")
    if any(not share > 0 for share in self.shares):
      raise errors.UserError(f"shares={self.shares} must all be above 0.")

  def capacities(self, num_layers: int, capacity: int) -> tuple[int, ...]:
    """Slots of each layer; their sum is `num_layers` times the capacity."""
    shares = self.shares or self._line(num_layers)
    if len(shares) != num_layers:
      raise errors.UserError(
          f"shares={self.shares} are {len(shares)}, of a model of"
          f" {num_layers} layers."
      )
    sized = self.base.with_capacity(capacity)
    least = min(sized.num_sinks + (sized.num_recent or 0) + 1, capacity)
    room = num_layers * (capacity - least)
    # Sums of the first n layers are rounded, and not the layers: the total is
    # exact.
    sums = itertools.accumulate(shares, initial=0.0)
    ends = [round(room * part / sum(shares)) for part in sums]
    return tuple(least + b - a for a, b in itertools.pairwise(ends))

  def _line(self, num_layers: int) -> tuple[float, ...]:
    steps = range(num_layers)
    last = max(num_layers - 1, 1)
    place = {
        "falling": lambda i: 1 - i / last,
        "rising": lambda i: i / last,
        "ends": lambda i: abs(2 * i / last - 1),
    }[self.curve]
    return tuple(1 + (self.ratio - 1) * place(i) for i in steps)
