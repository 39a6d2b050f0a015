"""The lanes of a TPU: padding to them, and what chip there is."""

from collections.abc import Mapping
from typing import cast

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import interpret
from kernels_pallas.hardware import types as hw_types

LANES = 128
_MIB = 1 << 20


def round_up(number: int, multiple: int) -> int:
  """The next multiple."""
  return -(-number // multiple) * multiple


def aligned(first: hw_types.Index, multiple: int) -> jax.Array:
  """A place in memory, of which the compiler then knows what it divides by."""
  return pl.multiple_of(cast(jax.Array, first), multiple)


def tpu_info() -> pltpu.TpuInfo:
  """The chip of the context mesh; a v5e where kernels are interpreted."""
  mesh = jax.sharding.get_abstract_mesh()
  device = getattr(mesh, "abstract_device", None)
  kind = getattr(device, "device_kind", "") or ""
  # A CPU has no TpuInfo; tiles must still be chosen for some chip.
  if interpret.mode() and not kind.startswith("TPU"):
    return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5E, 1)
  return pltpu.get_tpu_info()


def check_lanes(name: str, size: int | None) -> None:
  """Raises ValueError unless it is None, or whole rows of lanes."""
  if size is not None and (size < 1 or size % LANES):
    raise ValueError(
        f"{name}={size} must be a multiple of the {LANES} lanes of a TPU, such"
        f" as {round_up(max(size, 1), LANES)}"
    )


def over_vmem(what: str, need: Mapping[str, int], limit: int) -> str:
  """What an error says of a kernel that does not fit: the arithmetic.

  Args:
    what: What needs the memory, with its verb.
    need: Bytes by what for; what takes none is left out.
    limit: Bytes of VMEM that a kernel may take.
  """
  parts = " + ".join(f"{name} {n / _MIB:.1f}" for name, n in need.items() if n)
  info = tpu_info()
  return (
      f"{what} {sum(need.values()) / _MIB:.1f} MiB of VMEM: {parts}; a TPU"
      f" {info.chip_version} has {info.vmem_capacity_bytes / _MIB:.1f} MiB, of"
      f" which a kernel may take {limit / _MIB:.1f}"
  )


def to_heads(x: Float[Array, "B L N H"]) -> Float[Array, "B N L H"]:
  """Positions next to head_dim, as tiles need them; its own inverse."""
  return jnp.swapaxes(x, 1, 2)


def pad(x: Array, axis: int, multiple: int, fill: int | float = 0) -> Array:
  """Pads an axis to a multiple."""
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, -x.shape[axis] % multiple)
  if padding[axis] == (0, 0):
    return x
  return jnp.pad(x, padding, constant_values=fill)
