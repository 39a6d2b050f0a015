"""Many independent runs at once: `vmap` inside a device, `pmap` across devices.

Members of an ensemble (seeds x learning rates x data settings) share one
program and never talk to each other. R members are spread over G devices; H =
ceil(R / G) members live on each, the last ones padded with copies that are
dropped again. A device works through its members `group_size` at a time: all at
once on accelerators, one at a time on a CPU, where one member fills the cache.
With a fixed `group_size` the results do not depend on the number of devices.
"""

from collections.abc import Callable, Hashable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax.experimental import multihost_utils
from jaxtyping import Bool, PyTree
import numpy as np

# A pure function of one member and of a tree that all members share.
_Fn = Callable[..., PyTree]


@dataclasses.dataclass(frozen=True)
class Ensemble:
  """How R members lie on G devices.

  Attributes:
    num_members: R.
    devices: The G devices, of all processes, in the order of the members.
    group_size: Members that a device computes together (one `vmap`).
  """

  num_members: int
  devices: tuple[jax.Device, ...]
  group_size: int

  @property
  def members_per_device(self) -> int:
    """H, a multiple of `group_size`."""
    per_device = -(-self.num_members // len(self.devices))
    return -(-per_device // self.group_size) * self.group_size

  def scatter(self, members: PyTree) -> PyTree:
    """Lays leaves [R, ...] out as [G, H, ...]; this process's rows of them."""
    local = [d.process_index == jax.process_index() for d in self.devices]
    padded = len(self.devices) * self.members_per_device

    def lay_out(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
      # The last member is repeated: any other padding could diverge.
      index = np.minimum(np.arange(padded), self.num_members - 1)
      return leaf[index.reshape(len(self.devices), -1)[np.array(local)]]

    return jax.tree.map(lay_out, members)

  def gather(self, members: PyTree) -> PyTree:
    """Brings leaves [G, H, ...] to the host, as arrays [R, ...]."""
    if jax.process_count() > 1:
      members = multihost_utils.process_allgather(members, tiled=True)
    return jax.tree.map(
        lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:])[
            : self.num_members
        ],
        members,
    )

  def is_finite(self, members: PyTree) -> Bool[np.ndarray, "R"]:
    """Tells which members have no NaN or infinity; leaves [R, ...]."""
    is_good = np.ones(self.num_members, bool)
    for leaf in jax.tree.leaves(members):
      is_good &= np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1)
    return is_good

  def gathered_shapes(self, members: PyTree) -> PyTree:
    """Shapes of what `gather` makes of members of these shapes."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (self.num_members, *leaf.shape[2:]), leaf.dtype
        ),
        members,
    )

  def map(
      self, fn: _Fn, *, donate: bool = False, **static: Any
  ) -> Callable[..., PyTree]:
    """Lifts `fn(member, shared, **static)` to all members.

    Compilations are shared by calls with an equal `fn` and equal `static`, so
    `fn` should be a function of a module rather than a closure.

    Args:
      fn: A pure function of one member and of a tree that all members share.
      donate: Give the members' buffers up to the result.
      **static: Hashable arguments of `fn` that are known at compile time.

    Returns:
      A compiled function of members laid out by `scatter` and of the shared
      tree. It returns `fn`'s results in the layout of `scatter`.
    """
    return _mapped(
        fn, self.group_size, self.devices, donate, tuple(sorted(static.items()))
    )


def make_ensemble(
    num_members: int,
    *,
    devices: Sequence[jax.Device] | None = None,
    group_size: int | None = None,
) -> Ensemble:
  """Chooses devices and group size for a number of members.

  Args:
    num_members: R >= 1.
    devices: Devices to use, by default all; surplus ones stay idle.
    group_size: Members computed together; by default 1 on CPU and all members
      of a device elsewhere.

  Returns:
    The layout.

  Raises:
    ValueError: If there is no member or the group size is not positive.
  """
  if num_members < 1:
    raise ValueError(f"num_members must be at least 1, got {num_members}.")
  if group_size is not None and group_size < 1:
    raise ValueError(f"group_size must be at least 1, got {group_size}.")
  chosen = tuple(jax.devices() if devices is None else devices)
  # In the order in which `gather` finds the processes' members.
  chosen = tuple(sorted(chosen, key=lambda d: (d.process_index, d.id)))
  if jax.process_count() == 1:
    chosen = chosen[:num_members]
  if group_size is None:
    on_cpu = chosen[0].platform == "cpu"
    group_size = 1 if on_cpu else -(-num_members // len(chosen))
  return Ensemble(num_members, chosen, group_size)


# pmap caches by the identity of its function: a new closure at each call would
# compile again.
@functools.lru_cache(maxsize=64)
def _mapped(
    fn: _Fn,
    group_size: int,
    devices: tuple[jax.Device, ...],
    donate: bool,
    static: tuple[tuple[str, Hashable], ...],
) -> Callable[..., PyTree]:
  """Compiles `fn` for all members; its arguments are the key of the cache."""
  grouped = functools.partial(
      _map_groups, functools.partial(fn, **dict(static)), group_size
  )
  return jax.pmap(
      grouped,
      in_axes=(0, None),
      donate_argnums=0 if donate else (),
      devices=devices,
  )


def _map_groups(
    fn: _Fn, group_size: int, members: PyTree, shared: PyTree
) -> PyTree:
  """Applies `fn` to the members of one device, leaves [H, ...]."""
  on_group = jax.vmap(lambda member: fn(member, shared))
  if jax.tree.leaves(members)[0].shape[0] == group_size > 1:
    return on_group(members)
  # No vmap over one member: axes of size 1 would let the compiler order the
  # arithmetic differently on one device and on many.
  on_member = lambda member: fn(member, shared)
  batch_size = group_size if group_size > 1 else None
  return jax.lax.map(on_member, members, batch_size=batch_size)
