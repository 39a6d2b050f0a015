"""Who holds which part of a text on a ring of D devices.

Outside of the ring device d holds the d-th of D equal parts. Under a causal
mask the last part would meet all keys and the first almost none, while all wait
for the slowest. In a balanced (zig-zag) order the text has 2 D halves, and
device d holds halves d and 2 D - 1 - d: of all that come by, each device
computes as much as every other (https://arxiv.org/abs/2407.21783, section
3.3.2). To change from one order to the other, a device sends both of its halves
once.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks

_TreeT = TypeVar("_TreeT")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
  """Devices along a mesh axis that pass keys on.

  Attributes:
    axis: Name of the mesh axis.
    num_devices: D.
    is_balanced: Whether queries and keys are put into zig-zag order first.
    num_steps: Parts of the keys that each device meets, its own first.
  """

  axis: str
  num_devices: int
  is_balanced: bool
  num_steps: int

  @property
  def num_pieces(self) -> int:
    """Runs of neighbouring positions that a device holds."""
    return 2 if self.is_balanced else 1

  @property
  def multiple(self) -> int:
    """What the length of a whole text must be a multiple of."""
    return self.num_pieces * self.num_devices

  def pieces(self, device: Any) -> tuple[Any, ...]:
    """Which pieces a device holds, in the order in which they lie there."""
    return pieces_of(device, self.num_devices, self.is_balanced)

  def permute(self, tree: _TreeT, by: int) -> _TreeT:
    """Sends arrays to the device that comes `by` places later."""
    number = self.num_devices
    if by % number == 0:
      return tree
    pairs = [(i, (i + by) % number) for i in range(number)]
    return self._send(tree, pairs)

  def enter(self, x: jax.Array, axis: int) -> jax.Array:
    """Puts one axis of what the devices hold into the ring's order."""
    return self._exchange(x, axis, is_back=False)

  def leave(self, x: jax.Array, axis: int) -> jax.Array:
    """The inverse of `enter`."""
    return self._exchange(x, axis, is_back=True)

  def _exchange(self, x: jax.Array, axis: int, is_back: bool) -> jax.Array:
    if not self.is_balanced:
      return x
    halves = jnp.split(x, 2, axis=axis)
    moved = []
    for parity, half in enumerate(halves):
      pairs = [
          (device, _home(2 * device + parity, self.num_devices))
          for device in range(self.num_devices)
      ]
      pairs = [(to, start) for start, to in pairs] if is_back else pairs
      moved.append(self._send(half, pairs))
    return jnp.concatenate(moved, axis=axis)

  def _send(self, tree: _TreeT, pairs: Sequence[tuple[int, int]]) -> _TreeT:
    send = lambda x: jax.lax.ppermute(x, self.axis, pairs)
    return jax.tree.map(send, tree)


def pieces_of(
    device: Any, num_devices: int, is_balanced: bool
) -> tuple[Any, ...]:
  """The pieces of a device, a number or a traced one; the even half first."""
  if not is_balanced:
    return (device,)
  mirrored = 2 * num_devices - 1 - device
  xp = np if isinstance(device, int) else jnp
  is_even = device % 2 == 0
  return (
      xp.where(is_even, device, mirrored),
      xp.where(is_even, mirrored, device),
  )


def _home(half: int, num_devices: int) -> int:
  """The device that holds a half in zig-zag order."""
  return half if half < num_devices else 2 * num_devices - 1 - half


def plan(
    where: masks.Mask | None,
    num_queries: int,
    num_keys: int,
    axis: str,
    num_devices: int,
) -> Ring:
  """The ring that takes least time under a mask.

  Args:
    where: Of the whole text. One that is traced may allow anything, and is
      taken for a causal one.
    num_queries: Of the whole text.
    num_keys: Of the whole text.
    axis: Name of the mesh axis.
    num_devices: Along it.
  """
  ring = lambda is_balanced, num_steps: Ring(
      axis=axis,
      num_devices=num_devices,
      is_balanced=is_balanced,
      num_steps=num_steps,
  )
  if where is None:
    return ring(False, num_devices)
  if masks.numpy_of_mask(where) is not np:
    return ring(num_devices > 1, num_devices)
  # Halves are moved only where that saves work: windows are even as they are.
  found = []
  for is_balanced in (False, True):
    work = _work(where, num_queries, num_keys, num_devices, is_balanced)
    steps = max(np.flatnonzero(work.any(axis=0)), default=0) + 1
    found.append((work.max(axis=0).sum(), is_balanced, int(steps)))
  _, is_balanced, num_steps = min(found)
  return ring(is_balanced and num_devices > 1, num_steps)


def _work(
    where: masks.Mask,
    num_queries: int,
    num_keys: int,
    num_devices: int,
    is_balanced: bool,
) -> np.ndarray:
  """Pairs of query and key that device d computes at step s, [D, D]."""
  number = num_devices * (2 if is_balanced else 1)
  rows, columns = (-(-size // number) for size in (num_queries, num_keys))
  pairs = np.zeros((number, number), np.int64)
  for column in range(number):
    bounds = column * columns, min((column + 1) * columns, num_keys)
    starts, stops = (x.clip(*bounds) for x in (where.starts, where.stops))
    met = (stops - starts).clip(0).astype(np.int64)
    met = met.reshape(-1, num_queries).sum(axis=0)
    met = np.pad(met, (0, number * rows - num_queries))
    pairs[:, column] = met.reshape(number, rows).sum(axis=1)
  holds = [
      pieces_of(device, num_devices, is_balanced)
      for device in range(num_devices)
  ]
  work = np.zeros((num_devices, num_devices), np.int64)
  for device in range(num_devices):
    for step in range(num_devices):
      source = (device - step) % num_devices
      work[device, step] = pairs[np.ix_(holds[device], holds[source])].sum()
  return work
