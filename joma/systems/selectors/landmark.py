"""Landmark attention: blocks of keys are read by way of their last one.

The last token of each block is its landmark, a token put there for this. For a
query with its own block o, the weights are softmaxes of two levels,

  top  = softmax(logits of o's tokens, and of the landmarks of earlier blocks)
  w_ts = top_s in o,   top_landmark(b) softmax(logits of b's tokens)_s in b

and landmarks themselves have no value (https://arxiv.org/abs/2305.16300).
Landmarks whose logits are the log sums of their blocks' give softmax over all
tokens. With `k` a query reads its own block and the k - 1 blocks whose
landmarks it likes best: what training has taught is then a retrieval. Texts
need the landmarks in their places: `inserted` puts them there.

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
    num_keys, size = attn_logits.shape[-1], self.block
    if num_keys < size:  # No landmark is there yet.
      return _softmax(attn_logits)
    fill = [(0, 0)] * (attn_logits.ndim - 1) + [(0, -num_keys % size)]
    logits = jnp.pad(attn_logits, fill, constant_values=-jnp.inf)
    logits = logits.reshape(*attn_logits.shape[:-1], -1, size)
    block = masks.to_rank(jnp.arange(logits.shape[-2]), logits.ndim - 1)
    is_seen = ~jnp.isneginf(logits).all(axis=-1)
    own = jnp.where(is_seen, block, -1).max(axis=-1, keepdims=True)
    is_own = (block == own)[..., None]
    inner, marks = logits[..., :-1], logits[..., -1:]
    near = jnp.where(is_own, inner, -jnp.inf)
    far = jnp.where(is_own, -jnp.inf, marks)
    top = jnp.concatenate([near, far], axis=-1)
    top = _softmax(top.reshape(*top.shape[:-2], -1)).reshape(top.shape)
    found = top[..., :-1] + top[..., -1:] * _softmax(inner)
    found = jnp.concatenate([found, jnp.zeros_like(marks)], axis=-1)
    return found.reshape(*found.shape[:-2], -1)[..., :num_keys]

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
    heads, size = config.num_kv_heads, config.head_dim
    return jnp.zeros((batch_size, heads, num_blocks, size))

  def summarize(
      self,
      summary: Float[Array, "B K C H"],
      call: hooks.Call,
      key: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
  ) -> Float[Array, "B K C H"]:
    """Adds the landmarks among new keys."""
    num_blocks = summary.shape[2]
    is_mark = (positions + 1) % self.block == 0
    is_mark &= positions >= 0
    block = jnp.where(is_mark, positions // self.block, num_blocks)
    put = lambda marks, block, key: marks.at[:, block].set(
        key.swapaxes(0, 1).astype(marks.dtype), mode="drop"
    )
    return jax.vmap(put)(summary, block, key)

  def choose_by(
      self,
      query: Float[Array, "B K G H"],
      summary: Float[Array, "B K C H"],
      position: Int[Array, "B"],
      call: hooks.Call,
  ) -> tuple[Int[Array, "B K W"], Bool[Array, "B K W"]] | None:
    """Returns what one query a sequence reads, its own block last."""
    if not self.k:
      return None
    query = query.astype(jnp.float32).sum(axis=2)
    scores = jnp.einsum("BKH,BKCH->BKC", query, summary)
    own = (position // self.block)[:, None]
    own = jnp.broadcast_to(own, scores.shape[:2])
    blocks, is_valid = best_blocks.best(scores, own, self.k)
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


def _softmax(logits: Float[Array, "*b S"]) -> Float[Array, "*b S"]:
  """Softmax that is 0, with its gradient, where a row has nothing."""
  is_empty = jnp.isneginf(logits).all(axis=-1, keepdims=True)
  found = jax.nn.softmax(jnp.where(is_empty, 0.0, logits))
  return jnp.where(is_empty, 0.0, found)
