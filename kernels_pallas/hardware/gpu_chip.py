"""Which GPU programs are made for, and whether the kernels run there."""

import re

import jax
import jax.numpy as jnp

from kernels_pallas import interpret


def is_hopper() -> bool:
  """Whether programs are traced for a Hopper GPU, there or described."""
  mesh = jax.sharding.get_abstract_mesh()
  device = getattr(mesh, "abstract_device", None) or jax.devices()[0]
  return re.search(r"\bG?H\d+", device.device_kind) is not None


def why_not(
    dtype: jax.typing.DTypeLike, *, any_device: bool = False
) -> str | None:
  """Says why no kernel can compute this type here, None if one can.

  Args:
    dtype: Of the operands.
    any_device: Whether to leave out what the device is, as where programs are
      compiled for another one.
  """
  if jax.__version_info__ < (0, 11):
    return f"pallas_gpu needs jax >= 0.11, this is {jax.__version__}"
  if dtype not in (jnp.bfloat16, jnp.float16):
    return (
        f"pallas_gpu computes bfloat16 and float16, not {dtype}; use"
        " implementation='xla' for float32"
    )
  if any_device or interpret.mode() or is_hopper():
    return None
  return "pallas_gpu needs a Hopper GPU (H100, H200, GH200)"
