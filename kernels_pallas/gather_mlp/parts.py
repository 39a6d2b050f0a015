"""What the implementations of a gathered MLP share: weights, plan, options.

Letters: B batch, D width, F neurons, U blocks of the plan.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import implementations
from kernels_pallas import masks
from kernels_pallas.transformations import exported


class Weights(NamedTuple):
  """Of an MLP, a row a neuron: the rows of a block are one piece of memory.

  Attributes:
    up: Float [F, D].
    down: Float [F, D].
    gate: Float [F, D], or None.
    up_bias: Float [F], or None.
    gate_bias: Float [F], or None.
  """

  up: Float[Array, "F D"]
  down: Float[Array, "F D"]
  gate: Float[Array, "F D"] | None = None
  up_bias: Float[Array, "F"] | None = None
  gate_bias: Float[Array, "F"] | None = None


class Plan(NamedTuple):
  """Which blocks to visit, in order; and for whom.

  Attributes:
    blocks: int32 [U], no valid one twice; all within range.
    num: int32 [], how many of them count.
    member: Bool [B, U], whether a sequence chose a block; None if all did.
  """

  blocks: Int[Array, "U"]
  num: Int[Array, ""]
  member: Bool[Array, "B U"] | None = None


class Given(NamedTuple):
  """What a call computes with.

  Attributes:
    x: [B, D], any float type.
    weights: Of the MLP.
    plan: Which of its blocks.
  """

  x: Float[Array, "B D"]
  weights: Weights
  plan: Plan


class GivenHeads(NamedTuple):
  """What a projection of heads computes with.

  Attributes:
    rows: [B, D] into heads, [B, U, H] out of them.
    kernel: A matrix a head.
    plan: Which heads.
  """

  rows: Float[Array, "B *_"]
  kernel: Float[Array, "N H D"]
  plan: Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """What is known of a call while it is traced.

  Attributes:
    activation: A name in `activations.ACTIVATIONS`.
    block_size: Neurons of a block.
    config: Sizes of the implementation, None for its own choice.
  """

  activation: str
  block_size: int
  config: implementations.Config = None


def plan_of(
    block_ids: Int[masks.AnyArray, "... S"],
    num_valid: Int[masks.AnyArray, "..."] | int | None,
    num_blocks: int,
) -> Plan:
  """The blocks to visit.

  Lists of sequences become the union of their blocks, in ascending order: a
  block that several chose is read once. It has room for all blocks, or for all
  entries if those are fewer.

  Args:
    block_ids: [S] for all sequences, or [B, S].
    num_valid: How many entries of each list count; None is all.
    num_blocks: F / block_size.
  """
  ids = jnp.clip(jnp.asarray(block_ids, jnp.int32), 0, num_blocks - 1)
  width = ids.shape[-1]
  num_valid = width if num_valid is None else num_valid
  num_valid = jnp.clip(jnp.asarray(num_valid, jnp.int32), 0, width)
  if ids.ndim == 1:
    return Plan(ids, num_valid)
  batch = ids.shape[0]
  num_valid = jnp.broadcast_to(num_valid, (batch,))
  is_valid = jnp.arange(width)[None] < num_valid[:, None]
  row = jnp.broadcast_to(jnp.arange(batch)[:, None], ids.shape)
  # The maximum, as padding of a list may name a block that the list chose.
  chosen = jnp.zeros((batch, num_blocks), bool).at[row, ids].max(is_valid)
  is_any = chosen.any(axis=0)
  # Ascending, so that sums have one order, whichever order lists have.
  blocks = jnp.argsort(~is_any, stable=True).astype(jnp.int32)
  blocks = blocks[: min(num_blocks, exported.known(batch * width, num_blocks))]
  num = is_any.sum().astype(jnp.int32)
  return Plan(blocks, num, jnp.take(chosen, blocks, axis=1))


def is_all(plan: Plan, num_blocks: int) -> jax.Array | bool:
  """Whether every sequence chose every block; False if that cannot be."""
  if plan.blocks.shape[0] < num_blocks:
    return False
  # Ids are distinct: as many as there are blocks are all of them.
  found = plan.num == num_blocks
  return found if plan.member is None else found & plan.member.all()


def sum_type(dtype: jax.typing.DTypeLike) -> jnp.dtype:
  """What is summed in: float32, or float64 for float64."""
  return jnp.promote_types(dtype, jnp.float32)
