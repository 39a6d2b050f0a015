"""MoBA: each query reads its own block of keys and the blocks like it.

A block's score is the product of the query with the mean of the block's keys;
the k - 1 best of the complete blocks before it are read besides its own
(https://arxiv.org/abs/2502.13189, equations 5 to 7). Keys are rotated when
their mean is taken. Under grouped queries the heads of a group sum their scores
and share the blocks, so that a decode step reads each block once.

Every query chooses for itself: blocks of queries are of one query, which the
kernels of TPUs and GPUs do not take. XLA only. At decode the sums of the
blocks' keys are kept, and a step reads k blocks and one mean a block.

Paper's settings: blocks of 4,096 and the best 12, of texts up to a million
tokens.

Letters: B batch, T queries, S keys, N query heads, K key and value heads, G =
N / K, H head size, C blocks, W blocks that are read.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.systems.selectors import best_blocks
from joma.systems.selectors import block_cache
from joma.transformer import config as configs
from joma.transformer import hooks
from kernels_pallas import masks
from kernels_pallas import selection
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True)
class Moba(block_cache.InBlocks):
  """A selector.

  Attributes:
    k: Blocks that a query reads, its own included.
    block: Keys of a block.
  """

  name: ClassVar[str] = "moba"
  paper: ClassVar[str] = "https://arxiv.org/abs/2502.13189"
  neutral: ClassVar[str] = "moba:k=1048576"

  k: int = 4
  block: int = 128

  def __post_init__(self):
    if self.k < 1 or self.block < 1:
      raise errors.UserError(
          f"moba: k={self.k} and block={self.block} must not be below 1."
      )

  def select(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B S K H"],
      mask: masks.Mask,
  ) -> selection.Selection:
    """Returns the blocks of each query by itself."""
    fill = -key.shape[1] % self.block
    wide = lambda x: jax.lax.stop_gradient(x).astype(jnp.float32)
    padded = jnp.pad(wide(key), ((0, 0), (0, fill), (0, 0), (0, 0)))
    shape = (len(key), -1, self.block, *key.shape[2:])
    means = padded.reshape(shape).mean(axis=2).swapaxes(1, 2)
    return best_blocks.select(wide(query), means, mask, self.block, self.k)

  def init_summary(
      self, config: configs.TransformerConfig, batch_size: int, num_blocks: int
  ) -> Float[Array, "B K C H"]:
    """Sums of the blocks' keys: a step adds one key and reads none."""
    return best_blocks.no_keys(config, batch_size, num_blocks)

  def summarize(
      self,
      summary: Float[Array, "B K C H"],
      call: hooks.Call,
      key: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
  ) -> Float[Array, "B K C H"]:
    """Adds new keys to the sums of their blocks."""
    return best_blocks.put(summary, positions // self.block, key, True)

  def choose_by(
      self,
      query: Float[Array, "B K G H"],
      kept: Float[Array, "B K C H"],
      position: Int[Array, "B"],
      call: hooks.Call,
  ) -> tuple[Int[Array, "B K W"], Bool[Array, "B K W"]]:
    """Returns what one query a sequence reads, by the blocks' means."""
    first = jnp.arange(kept.shape[2])[None] * self.block
    count = jnp.clip(position[:, None] + 1 - first, 1, self.block)
    means = kept / count[:, None, :, None]
    return best_blocks.best_of_query(query, means, position, self.block, self.k)
