"""HiP: each block of queries finds its blocks of keys by a search in a tree.

The blocks before a query block are cut into m equal chunks. At every step each
chunk is halved, both halves are scored by the key in the middle of their middle
block, and the m best stay, until a chunk is a block: 2 m log2(C / m) products a
query instead of C. The first blocks and the newest ones are read besides
(https://arxiv.org/abs/2406.09827). A score that stands alone among low ones is
easily missed; scores that are alike over a few blocks are found.

Letters: B batch, T queries, S keys, N query heads, K key and value heads, G =
N / K, H head size, C blocks, R query blocks, m blocks that are kept, W blocks
that are read.
"""

from collections.abc import Callable
import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.systems import kept_whole
from joma.systems.selectors import block_cache
from joma.systems.selectors import tree_search
from joma.transformer import hooks
from kernels_pallas import masks
from kernels_pallas import selection
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True)
class Hip(block_cache.InBlocks):
  """A selector.

  Attributes:
    k: Keys that the search keeps, a multiple of `block`.
    block: Keys of a block, and queries; TPU kernels want multiples of 128.
    sinks: First blocks that are always read.
    window: Newest blocks that are always read, a query's own included.
    stride: Of a block's queries every so many-th is asked in a prompt.
  """

  name: ClassVar[str] = "hip"
  paper: ClassVar[str] = "https://arxiv.org/abs/2406.09827"
  neutral: ClassVar[str] = "hip:k=1048576"
  sees_later: ClassVar[str] = "a block of queries searches for all of them"

  k: int = 512
  block: int = 128
  sinks: int = 1
  window: int = 1
  stride: int = 1

  def __post_init__(self):
    if self.stride < 1 or self.block % self.stride:
      raise errors.UserError(
          f"hip: stride={self.stride} must divide block={self.block}."
      )
    if self.block < 1 or self.k < self.block or self.k % self.block:
      raise errors.UserError(
          f"hip: k={self.k} must be a multiple of block={self.block}."
      )
    if self.sinks < 0 or self.window < 1:
      raise errors.UserError("hip: sinks must not be below 0, window below 1.")

  def select(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B S K H"],
      mask: masks.Mask,
  ) -> selection.Selection:
    """Returns what is found for every block of queries, and the mask."""
    size, (batch, length, num_heads, _) = self.block, query.shape
    num_blocks = -(-length // size)
    score = tree_search.middle_scores(query, key, size, self.stride)
    newest = jnp.arange(num_blocks)[None, None]
    newest = jnp.broadcast_to(newest, (batch, num_heads, num_blocks))
    blocks, is_valid = self.find(score, newest, num_blocks)
    # Selections list the valid blocks first, and say how many those are.
    order = jnp.argsort(~is_valid, axis=-1, stable=True)
    blocks = jnp.take_along_axis(blocks, order, axis=-1)
    count = is_valid.sum(axis=-1).astype(jnp.int32)
    return selection.Selection(blocks, count, mask, size, size)

  def choose_by(
      self,
      query: Float[Array, "B K G H"],
      kept: Float[Array, "B K S H"],
      position: Int[Array, "B"],
      call: hooks.Call,
  ) -> tuple[Int[Array, "B K W"], Bool[Array, "B K W"]]:
    """Returns what one query a sequence finds; its groups share the blocks."""
    num_blocks = kept.shape[2] // self.block

    def score(index: Array) -> Array:
      middles = index * self.block + self.block // 2
      # Reads these keys, not the cache: bytes do not grow with the text.
      found = kept_whole.blocks(kept, middles, 1)[:, :, :, 0]
      return jnp.einsum("BKGH,BKWH->BKGW", query, found).max(axis=2)

    newest = jnp.broadcast_to((position // self.block)[:, None], kept.shape[:2])
    return self.find(score, newest, num_blocks)

  def find(
      self, score: Callable[[Array], Array], newest: Array, num_blocks: int
  ) -> tuple[Array, Array]:
    """Joins first blocks, newest blocks and those of the search.

    Args:
      score: Of blocks [*newest, 2 m].
      newest: Block of each query.
      num_blocks: C, static.
    """
    near = newest[..., None] - masks.to_rank(
        jnp.arange(self.window), newest.ndim + 1
    )
    first = masks.to_rank(jnp.arange(self.sinks), newest.ndim + 1)
    first = jnp.broadcast_to(first, (*newest.shape, self.sinks))
    # The search is for what lies between first and newest blocks, so that no
    # block is read twice.
    num_kept = min(self.k // self.block, num_blocks)
    found, is_found = tree_search.search(
        score,
        jnp.full_like(newest, self.sinks),
        newest - self.window + 1,
        num_kept,
        tree_search.num_steps(num_blocks, num_kept),
    )
    blocks = jnp.concatenate([first, near, found], axis=-1)
    is_valid = jnp.concatenate(
        [first <= newest[..., None], near >= self.sinks, is_found], axis=-1
    )
    # What does not count is looked up all the same: block 0 is always there.
    return jnp.where(is_valid, blocks, 0).astype(jnp.int32), is_valid
