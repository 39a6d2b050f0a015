"""A gathered MLP by XLA, block by block; what CPUs run.

A loop over the blocks of the plan reads each once, where it is: nothing is
gathered first. It ends after `num_valid` blocks, which may depend on data. A
plan of all blocks is computed by `dense`, the same products over all neurons as
a dense MLP makes, so that it equals that bit by bit.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import implementations
from kernels_pallas.gather_mlp import parts
from kernels_pallas.gather_mlp import reference
from kernels_pallas.hardware import types as hw_types


@dataclasses.dataclass(frozen=True)
class Config:
  """There is nothing to choose."""


def forward(given: parts.Given, spec: parts.Spec) -> Float[Array, "B D"]:
  """Computes the op without `down_bias`, in the type of the sums."""
  x, weights, plan = given
  dtype = parts.sum_type(x.dtype)

  def visit(i: hw_types.Index, total: jax.Array):
    block = slabs(weights, plan.blocks[i], spec.block_size)
    hidden = reference.hidden_of(x, block, spec.activation)
    hidden = _of_members(hidden, plan, i)
    return total + reference.read(hidden, block.down)

  def by_block() -> jax.Array:
    return jax.lax.fori_loop(0, plan.num, visit, jnp.zeros(x.shape, dtype))

  return of_all_or(
      lambda: dense(x, weights, spec.activation),
      by_block,
      plan,
      weights.up.shape[0] // spec.block_size,
  )


def dense(
    x: Float[Array, "B D"], weights: parts.Weights, activation: str
) -> Float[Array, "B D"]:
  """The MLP of all neurons, in the type of the sums."""
  hidden = reference.hidden_of(x, weights, activation)
  return reference.read(hidden, weights.down)


def backward(
    given: parts.Given, d_out: Float[Array, "B D"], spec: parts.Spec
) -> tuple[Float[Array, "B D"], parts.Weights]:
  """Cotangents of x, in the type of the sums, and of the weights.

  Blocks that nobody chose stay exactly 0.
  """
  x, weights, plan = given
  dtype = parts.sum_type(x.dtype)

  def visit(i: hw_types.Index, totals: tuple[jax.Array, parts.Weights]):
    index, (d_x, d_weights) = plan.blocks[i], totals
    block = slabs(weights, index, spec.block_size)

    def run(x: jax.Array, block: parts.Weights) -> jax.Array:
      hidden = reference.hidden_of(x, block, spec.activation)
      return reference.read(_of_members(hidden, plan, i), block.down)

    # The block is read once: its values are made again from it, not stored.
    _, pullback = jax.vjp(run, x.astype(dtype), block)
    d_x_here, d_block = pullback(d_out.astype(dtype))
    put = lambda total, slab: jax.lax.dynamic_update_slice_in_dim(
        total, slab, index * spec.block_size, axis=0
    )
    return d_x + d_x_here, jax.tree.map(put, d_weights, d_block)

  zeros = jnp.zeros(x.shape, dtype), jax.tree.map(jnp.zeros_like, weights)
  return jax.lax.fori_loop(0, plan.num, visit, zeros)


def slabs(
    weights: parts.Weights, index: hw_types.Index, size: int
) -> parts.Weights:
  """The rows of a block."""
  cut = lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=0)
  return jax.tree.map(cut, weights)


def of_all_or(
    all_of: Callable[[], jax.Array],
    some: Callable[[], jax.Array],
    plan: parts.Plan,
    num_blocks: int,
) -> jax.Array:
  """`all_of()` where the plan is of all blocks, else `some()`."""
  # Decided while tracing where the lists are too short to be all blocks.
  found = parts.is_all(plan, num_blocks)
  return some() if found is False else jax.lax.cond(found, all_of, some)


def _of_members(
    hidden: jax.Array, plan: parts.Plan, i: hw_types.Index
) -> jax.Array:
  """0 for those who did not choose the block."""
  if plan.member is None:
    return hidden
  return jnp.where(plan.member[:, i, None], hidden, 0)


def into_heads(
    given: parts.GivenHeads, config: implementations.Config = None
) -> Float[Array, "B U H"]:
  """As `reference.into_heads`; what is past the number of the plan is 0."""
  x, kernel, plan = given
  dtype = parts.sum_type(x.dtype)
  x = x.astype(dtype)
  shape = (x.shape[0], plan.blocks.shape[0], kernel.shape[1])

  def visit(i: hw_types.Index, heads: jax.Array):
    head = kernel[plan.blocks[i]].astype(dtype)
    part = jnp.einsum("BD,HD->BH", x, head, precision="highest")
    return jax.lax.dynamic_update_slice_in_dim(heads, part[:, None], i, axis=1)

  return of_all_or(
      lambda: reference.into_heads(given, config),
      lambda: jax.lax.fori_loop(0, plan.num, visit, jnp.zeros(shape, dtype)),
      plan,
      kernel.shape[0],
  )


def out_of_heads(
    given: parts.GivenHeads, config: implementations.Config = None
) -> Float[Array, "B D"]:
  """As `reference.out_of_heads`."""
  heads, kernel, plan = given
  dtype = parts.sum_type(heads.dtype)
  heads = heads.astype(dtype)

  def visit(i: hw_types.Index, total: jax.Array):
    head = kernel[plan.blocks[i]].astype(dtype)
    part = jax.lax.dynamic_index_in_dim(heads, i, axis=1, keepdims=False)
    return total + jnp.einsum("BH,HD->BD", part, head, precision="highest")

  zeros = jnp.zeros((heads.shape[0], kernel.shape[2]), dtype)
  return of_all_or(
      lambda: reference.out_of_heads(given, config),
      lambda: jax.lax.fori_loop(0, plan.num, visit, zeros),
      plan,
      kernel.shape[0],
  )
