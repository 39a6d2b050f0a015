"""Which GPU programs are made for, and whether the kernels run there."""

import re

import jax
import jax.numpy as jnp

from kernels_pallas import interpret


def is_hopper() -> bool:
  """Whether programs are traced for a Hopper GPU, there or described."""
  # The context's device first: programs are also made for chips not there.
  mesh = jax.sharding.get_abstract_mesh()
  device = getattr(mesh, "abstract_device", None) or jax.devices()[0]
  return re.search(r"\bG?H\d+", device.device_kind) is not None


def why_not_type(dtype: jax.typing.DTypeLike) -> str | None:
  """Says why no kernel can compute this type, None if one can."""
  if jax.__version_info__ < (0, 11):
    return f"pallas_gpu needs jax >= 0.11, this is {jax.__version__}"
  if dtype not in (jnp.bfloat16, jnp.float16):
    return (
        f"pallas_gpu computes bfloat16 and float16, not {dtype}; use"
        " implementation='xla' for float32"
    )
  return None


def why_not(
    query: jax.Array | jax.ShapeDtypeStruct, what: str, most: int
) -> str | None:
  """Says why no kernel can compute this here, None if one can.

  Args:
    query: Array or its abstract value.
    what: What its last axis is, for the answer.
    most: The largest that kernels take.
  """
  reason = why_not_type(query.dtype)
  if reason is not None:
    return reason
  if query.shape[-1] > most:
    return f"pallas_gpu has {what} of up to {most}, not of {query.shape[-1]}"
  return why_not_here()


def why_not_here() -> str | None:
  """Says why no kernel can run where programs are made for, None if one can."""
  if interpret.mode() or is_hopper():
    return None
  return "pallas_gpu needs a Hopper GPU (H100, H200, GH200)"
