"""A gathered MLP on Hopper GPUs: a kernel for each product, in both passes.

What is between the products, of the size of the chosen neurons, is XLA's. No
figure of speed is known yet: the kernels are compiled for the H100 and checked
by interpretation.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import activations
from kernels_pallas.gather_mlp import parts
from kernels_pallas.gather_mlp.gpu import gather
from kernels_pallas.gather_mlp.gpu import scatter
from kernels_pallas.hardware import gpu_chip
from kernels_pallas.transformations import exported

Config = gather.Config


def forward(given: parts.Given, spec: parts.Spec) -> Float[Array, "B D"]:
  """Computes the op without `down_bias`, in float32.

  Raises:
    ValueError: If the kernels do not have the type or the sizes.
  """
  x, weights, plan = given
  _check(x, spec.block_size)
  size, config = spec.block_size, spec.config or Config()
  hidden = _hidden(*_before(x, weights, plan, spec), plan, spec)
  hidden = hidden.astype(x.dtype)
  return gather.out_of_rows(hidden, weights.down, plan, size, config)


def backward(
    given: parts.Given, d_out: Float[Array, "B D"], spec: parts.Spec
) -> tuple[Float[Array, "B D"], parts.Weights]:
  """Cotangents of x, in float32, and of the weights, in their type.

  Slabs of what x is multiplied by are read twice: before the cotangent of a
  neuron is known, and after.

  Raises:
    ValueError: As `forward`.
  """
  x, weights, plan = given
  _check(x, spec.block_size)
  size, config = spec.block_size, spec.config or Config()
  num_blocks = weights.up.shape[0] // size
  # Factors of matrix instructions have 16 bits, as in the forward pass.
  d_out = d_out.astype(x.dtype)
  before = _before(x, weights, plan, spec)
  made = lambda up, gate: _hidden(up, gate, plan, spec)
  # What is between the products is elementwise, and left to XLA.
  hidden, pullback = jax.vjp(made, *before)
  d_hidden = gather.into_rows(d_out, weights.down, plan, size, config)
  d_up, d_gate = pullback(d_hidden)
  outer = lambda of_neurons, of_columns: scatter.outer(
      of_neurons.astype(x.dtype), of_columns, plan, size, num_blocks
  )
  d_x = jnp.zeros(x.shape, jnp.float32)
  found: dict[str, Any] = {"down": outer(hidden, d_out)}
  for name, d_before in (("up", d_up), ("gate", d_gate)):
    matrix = getattr(weights, name)
    if matrix is None:
      continue
    d_x += gather.out_of_rows(
        d_before.astype(x.dtype), matrix, plan, size, config
    )
    found[name] = outer(d_before, x)
    if getattr(weights, f"{name}_bias") is not None:
      found[f"{name}_bias"] = _of_all(d_before, plan, size, num_blocks)
  return d_x, parts.Weights(**found)


def _before(
    x: jax.Array, weights: parts.Weights, plan: parts.Plan, spec: parts.Spec
) -> tuple[jax.Array, jax.Array | None]:
  """What goes into the neurons of the plan, by up and by gate, float32."""
  size, config = spec.block_size, spec.config or Config()

  def affine(matrix: jax.Array, bias: jax.Array | None) -> jax.Array:
    before = gather.into_rows(x, matrix, plan, size, config)
    if bias is None:
      return before
    chosen = bias.astype(jnp.float32).reshape(-1, size)[plan.blocks]
    return before + chosen.reshape(1, -1)

  before = affine(weights.up, weights.up_bias)
  if weights.gate is None:
    return before, None
  return before, affine(weights.gate, weights.gate_bias)


def _hidden(
    up: jax.Array, gate: jax.Array | None, plan: parts.Plan, spec: parts.Spec
) -> jax.Array:
  """What comes out of them, 0 for who did not choose their block."""
  activation = activations.ACTIVATIONS[spec.activation]
  hidden = activation(up) if gate is None else activation(gate) * up
  if plan.member is None:
    return hidden
  keeps = jnp.repeat(plan.member, spec.block_size, axis=1)
  return jnp.where(keeps, hidden, 0.0)


def _of_all(
    d_before: jax.Array, plan: parts.Plan, size: int, num_blocks: int
) -> jax.Array:
  """The gradient of a bias, 0 where nobody chose."""
  entries = scatter.entries(plan, num_blocks)
  by_block = d_before.sum(axis=0).reshape(-1, size)[jnp.maximum(entries, 0)]
  return jnp.where(entries[:, None] >= 0, by_block, 0.0).reshape(-1)


def into_heads(
    given: parts.GivenHeads, config: Config | None = None
) -> Float[Array, "B U H"]:
  """As `reference.into_heads`, 0 past the number of the plan.

  Raises:
    ValueError: If the kernels do not have the type or the sizes.
  """
  x, matrix, plan, size = _laid_out(given)
  out = gather.into_rows(x, matrix, plan, size, config or Config())
  return out.reshape(x.shape[0], -1, size)


def out_of_heads(
    given: parts.GivenHeads, config: Config | None = None
) -> Float[Array, "B D"]:
  """As `reference.out_of_heads`.

  Raises:
    ValueError: If the kernels do not have the type or the sizes.
  """
  heads, matrix, plan, size = _laid_out(given)
  hidden = heads.reshape(heads.shape[0], -1)
  return gather.out_of_rows(hidden, matrix, plan, size, config or Config())


def _laid_out(
    given: parts.GivenHeads,
) -> tuple[jax.Array, jax.Array, parts.Plan, int]:
  """What is projected, all heads as one matrix, the plan and a head's size."""
  x, kernel, plan = given
  size, width = kernel.shape[1:]
  _check(x, size, width)
  return x, kernel.reshape(-1, width), plan, size


def why_not(
    x: jax.Array | jax.ShapeDtypeStruct, size: int, width: int | None = None
) -> str | None:
  """Says why the kernels cannot compute this, None if they can.

  Args:
    x: Array or its abstract value; its first axis is the batch.
    size: Neurons of a block, or of a head.
    width: D; None is the last axis of x.
  """
  reason = gpu_chip.why_not_type(x.dtype)
  if reason is not None:
    return reason
  tile, most = gather.TILE, gather.MOST_SEQUENCES
  width = x.shape[-1] if width is None else width
  if size % tile or width % tile:
    return (
        f"pallas_gpu needs blocks and widths that are multiples of {tile}, not"
        f" {size} and {width}"
    )
  if exported.known(x.shape[0], most) > most:
    return f"pallas_gpu takes up to {most} sequences, not {x.shape[0]}"
  return gpu_chip.why_not_here()


def _check(x: jax.Array, size: int, width: int | None = None) -> None:
  reason = why_not(x, size, width)
  if reason is not None:
    raise ValueError(reason)
