"""A gathered MLP on Hopper GPUs: a kernel for each product, forward.

What is between the products, of the size of the chosen neurons, is XLA's, and
so is the backward pass. No figure of speed is known yet: the kernels are
compiled for the H100 and checked by interpretation.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import interpret
from kernels_pallas.gather_mlp import gpu_gather
from kernels_pallas.gather_mlp import parts
from kernels_pallas.gather_mlp import xla
from kernels_pallas.tiles import gpu_attention

Config = gpu_gather.Config


def forward(
    x: Float[Array, "B D"],
    weights: parts.Weights,
    plan: parts.Plan,
    spec: parts.Spec,
) -> Float[Array, "B D"]:
  """Computes the op without `down_bias`, in float32.

  Raises:
    ValueError: If the kernels do not have the type or the sizes.
  """
  _check(x, spec.block_size)
  size, config = spec.block_size, spec.config or Config()

  def affine(matrix, bias):
    hidden = gpu_gather.into_rows(x, matrix, plan, size, config)
    if bias is None:
      return hidden
    chosen = bias.astype(jnp.float32).reshape(-1, size)[plan.blocks]
    return hidden + chosen.reshape(1, -1)

  activation = parts.ACTIVATIONS[spec.activation]
  hidden = affine(weights.up, weights.up_bias)
  if weights.gate is None:
    hidden = activation(hidden)
  else:
    hidden *= activation(affine(weights.gate, weights.gate_bias))
  if plan.member is not None:
    hidden = jnp.where(jnp.repeat(plan.member, size, axis=1), hidden, 0.0)
  hidden = hidden.astype(x.dtype)
  return gpu_gather.out_of_rows(hidden, weights.down, plan, size, config)


def backward(
    x: Float[Array, "B D"],
    weights: parts.Weights,
    plan: parts.Plan,
    d_out: Float[Array, "B D"],
    spec: parts.Spec,
) -> tuple[Float[Array, "B D"], parts.Weights]:
  """As `xla.backward`."""
  return xla.backward(x, weights, plan, d_out, spec)


def into_heads(
    x: Float[Array, "B D"],
    kernel: Float[Array, "N H D"],
    plan: parts.Plan,
    config: Config | None = None,
) -> Float[Array, "B U H"]:
  """As `reference.into_heads`, 0 past the number of the plan.

  Raises:
    ValueError: If the kernels do not have the type or the sizes.
  """
  size = kernel.shape[1]
  _check(x, size, kernel.shape[2])
  matrix = kernel.reshape(-1, kernel.shape[2])
  out = gpu_gather.into_rows(x, matrix, plan, size, config or Config())
  return out.reshape(x.shape[0], -1, size)


def out_of_heads(
    heads: Float[Array, "B U H"],
    kernel: Float[Array, "N H D"],
    plan: parts.Plan,
    config: Config | None = None,
) -> Float[Array, "B D"]:
  """As `reference.out_of_heads`.

  Raises:
    ValueError: If the kernels do not have the type or the sizes.
  """
  size = kernel.shape[1]
  _check(heads, size, kernel.shape[2])
  matrix = kernel.reshape(-1, kernel.shape[2])
  hidden = heads.reshape(heads.shape[0], -1)
  return gpu_gather.out_of_rows(hidden, matrix, plan, size, config or Config())


def why_not(x: Any, size: int, width: int | None = None) -> str | None:
  """Says why the kernels cannot compute this, None if they can.

  Args:
    x: Array or its abstract value; its first axis is the batch.
    size: Neurons of a block, or of a head.
    width: D; None is the last axis of x.
  """
  if jax.__version_info__ < (0, 11):
    return f"pallas_gpu needs jax >= 0.11, this is {jax.__version__}"
  if x.dtype not in (jnp.bfloat16, jnp.float16):
    return (
        f"pallas_gpu computes bfloat16 and float16, not {x.dtype}; use"
        " implementation='xla' for float32"
    )
  tile, most = gpu_gather.TILE, gpu_gather.MOST_SEQUENCES
  width = x.shape[-1] if width is None else width
  if size % tile or width % tile:
    return (
        f"pallas_gpu needs blocks and widths that are multiples of {tile}, not"
        f" {size} and {width}"
    )
  if x.shape[0] > most:
    return f"pallas_gpu takes up to {most} sequences, not {x.shape[0]}"
  if interpret.mode() or gpu_attention.is_hopper():
    return None
  return "pallas_gpu needs a Hopper GPU (H100, H200, GH200)"


def _check(x: Any, size: int, width: int | None = None) -> None:
  reason = why_not(x, size, width)
  if reason is not None:
    raise ValueError(reason)
