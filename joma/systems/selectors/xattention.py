"""XAttention: blocks of a prompt by the sums of their antidiagonals.

Queries and keys are cut into groups of `stride`. The logit of a group of
queries r and one of keys c is the sum along the antidiagonal of their tile,

  logit_rc = scale / m sum_i q_(r m + m - 1 - i) k_(c m + i),    m = stride

which meets every row and every column of the tile once. Softmax over c <= r,
summed over the groups of a block of queries and of a block of keys, is the
block's mass; the fewest blocks that hold `threshold` of it are read, the first
and a query's own always (https://arxiv.org/abs/2503.16428). The choice costs
1 / stride of the logits. It is a rule for prompts: a step reads everything.

Paper's settings: a threshold of .9, blocks of 128.

Letters: B batch, T queries, S keys, N query heads, K key and value heads, G =
N / K, H head size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.systems.selectors import antidiagonals
from joma.systems.selectors import block_cache
from joma.transformer import hooks
from kernels_pallas import masks
from kernels_pallas import selection
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class XAttention(block_cache.InBlocks):
  """A selector.

  Attributes:
    threshold: Share of the mass that the blocks hold; 1 reads all.
    stride: Tokens of a group.
    block: Keys of a block, and queries; TPU kernels want multiples of 128.
    k: Most blocks that a block of queries reads; 0 is no limit.
  """

  name: ClassVar[str] = "xattention"
  paper: ClassVar[str] = "https://arxiv.org/abs/2503.16428"
  neutral: ClassVar[str] = "xattention:threshold=1"
  sees_later: ClassVar[str] = "a block of queries chooses for all of them"

  threshold: float = 0.9
  stride: int = 16
  block: int = 128
  k: int = 0

  def __post_init__(self):
    require.at_least("xattention: stride", self.stride, 1)
    require.at_least("xattention: k", self.k, 0)
    if not 0 < self.threshold <= 1:
      raise errors.UserError(
          f"xattention: threshold={self.threshold} must lie in (0, 1]."
      )
    if self.block < self.stride or self.block % self.stride:
      raise errors.UserError(
          f"xattention: block={self.block} must be a multiple of"
          f" stride={self.stride}."
      )

  def select(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B S K H"],
      mask: masks.Mask,
  ) -> selection.Selection:
    """Returns the blocks of every block of queries, and the mask."""
    size, (batch, length, num_heads, _) = self.block, query.shape
    num_blocks = -(-length // size)
    query, key = antidiagonals.grouped(query, key, size, self.stride)

    def find(one: tuple[Array, Array]) -> tuple[Array, Array]:
      # One block of queries at a time: no array is of groups by groups.
      own, query = one
      scale = call.options.scale / self.stride
      mass = antidiagonals.mass(query, key, own, scale)
      mass = mass.reshape(batch, num_heads, -1)
      return antidiagonals.fewest(mass, own, self.threshold, self.k)

    blocks, is_valid = jax.lax.map(find, (jnp.arange(num_blocks), query))
    return selection.Selection(
        jnp.moveaxis(blocks, 0, 2),
        jnp.moveaxis(is_valid, 0, 2).sum(axis=-1).astype(jnp.int32),
        mask,
        size,
        size,
    )

  def choose_by(
      self,
      query: Float[Array, "B K G H"],
      kept: PyTree,
      position: Int[Array, "B"],
      call: hooks.Call,
  ) -> None:
    """None: a step reads everything."""
