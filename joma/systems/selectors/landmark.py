"""Landmark attention: blocks of keys are read by way of their last one.

The last token of each block is its landmark, a token put there for this. A
query's weights are the softmax of `two_levels`: over its own block and earlier
landmarks, and within the blocks of these (https://arxiv.org/abs/2305.16300).
Landmarks whose logits are the log sums of their blocks' give softmax over all
tokens. With `k` a query reads its own block and the k - 1 blocks whose
landmarks it likes best: what training has taught is then a retrieval. Texts
need the landmarks in their places: `inserted` puts them there. XLA only: no
kernel knows weights of two levels.

Paper's settings: blocks of 50 tokens and a landmark.

Letters: B batch, T queries, S keys, N query heads, K key and value heads, G =
N / K, C blocks, W blocks that are read, H head size, R tokens without landmark.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.systems.selectors import best_blocks
from joma.systems.selectors import block_cache
from joma.systems.selectors import two_levels
from joma.transformer import config as configs
from joma.transformer import hooks
from kernels_pallas import masks
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class Landmark:
  """A score rule, and a selector.

  Attributes:
    block: Tokens of a block, its landmark included.
    k: Blocks that a query reads, its own included; 0 is all.
  """

  name: ClassVar[str] = "landmark"
  paper: ClassVar[str] = "https://arxiv.org/abs/2305.16300"
  neutral: ClassVar[str] = "landmark:block=1048576"

  block: int = 51
  k: int = 0

  def __post_init__(self):
    require.at_least("landmark: block", self.block, 2)
    require.at_least("landmark: k", self.k, 0)

  def weights(self, params: hooks.Params, call: hooks.Call) -> hooks.WeightRule:
    """A rule of two levels."""
    return hooks.WeightRule(name=self.name, normalize=self.of_logits)

  def of_logits(
      self, attn_logits: Float[Array, "*b S"]
  ) -> Float[Array, "*b S"]:
    """Weights of logits, whole blocks side by side, the query's own last."""
    return two_levels.weights(attn_logits, self.block)

  def select(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B S K H"],
      mask: masks.Mask,
  ) -> hooks.Where:
    """Returns the blocks of each query by itself, or the mask."""
    size = self.block
    if not self.k or query.shape[1] <= size:
      return mask
    wide = lambda x: jax.lax.stop_gradient(x).astype(jnp.float32)
    fill = ((0, 0), (0, -key.shape[1] % size), (0, 0), (0, 0))
    marks = jnp.pad(wide(key), fill)[:, size - 1 :: size].swapaxes(1, 2)
    return best_blocks.select(wide(query), marks, mask, size, self.k)

  def init_summary(
      self, config: configs.TransformerConfig, batch_size: int, num_blocks: int
  ) -> Float[Array, "B K C H"]:
    """Keys of the landmarks, side by side."""
    return best_blocks.no_keys(config, batch_size, num_blocks)

  def summarize(
      self,
      summary: Float[Array, "B K C H"],
      call: hooks.Call,
      key: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
  ) -> Float[Array, "B K C H"]:
    """Adds the landmarks among new keys."""
    is_mark = (positions >= 0) & ((positions + 1) % self.block == 0)
    block = jnp.where(is_mark, positions // self.block, -1)
    return best_blocks.put(summary, block, key, False)

  def choose_by(
      self,
      query: Float[Array, "B K G H"],
      kept: Float[Array, "B K C H"],
      position: Int[Array, "B"],
      call: hooks.Call,
  ) -> tuple[Int[Array, "B K W"], Bool[Array, "B K W"]] | None:
    """Returns what one query a sequence reads, its own block last."""
    if not self.k:
      return None
    blocks, is_valid = best_blocks.best_of_query(
        query, kept, position, self.block, self.k
    )
    last = lambda x: jnp.roll(x, -1, axis=-1)
    return last(blocks), last(is_valid)

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> hooks.KVCache:
    """Returns an empty cache of whole blocks and their landmarks."""
    system = dataclasses.replace(self, block=max(min(self.block, capacity), 2))
    return block_cache.init(system, config, batch_size, capacity, dtype)


def inserted(
    tokens: Int[Array, "B R"], landmark: int, block: int
) -> Int[Array, "B T"]:
  """Puts a landmark behind every `block - 1` tokens, none behind the rest."""
  batch, length = tokens.shape
  num_whole = length // (block - 1)
  whole = tokens[:, : num_whole * (block - 1)]
  whole = whole.reshape(batch, num_whole, block - 1)
  whole = jnp.pad(whole, ((0, 0), (0, 0), (0, 1)), constant_values=landmark)
  rest = tokens[:, num_whole * (block - 1) :]
  return jnp.concatenate([whole.reshape(batch, -1), rest], axis=1)
