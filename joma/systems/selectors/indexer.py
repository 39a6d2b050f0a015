"""The lightning indexer of DeepSeek's sparse attention chooses keys by tokens.

  I_ts = (J E)^-1/2 sum_j w_tj ReLU(q_tj k_s),   q, k, w projections of x

A query reads the keys of greatest I, the same for all heads
(https://arxiv.org/abs/2512.02556). Of one key a token and few heads the choice
is cheap, though every token is looked at; a decode step keeps these keys and
reads `k` of the others. Its parameters learn from a loss of their own, the
distance of softmax(I) to what attention gave each key, summed over heads, over
the keys that were read:

  loss = mean over t of KL(mean over heads of weights_t | softmax of I_t)

x and weights are without gradient there. Ours differs in small things: no norm
of the index keys, rotary positions on all of them. XLA only: blocks of queries
are of one query.

Paper's settings: 2,048 keys, chosen by small heads of 128.

Letters: B batch, T queries, D width, S keys, N query heads, K key and value
heads, G = N / K, J heads of the indexer, E = H head size, C blocks, W blocks
that are read.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.systems.selectors import block_cache
from joma.systems.selectors import index_search
from joma.systems.selectors import indexer_loss
from joma.transformer import config as configs
from joma.transformer import hooks
from kernels_pallas import masks
from kernels_pallas import selection
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class Indexer(block_cache.InBlocks):
  """A selector.

  Attributes:
    k: Keys that a query reads, a multiple of `block`.
    block: Keys that are read together, by the best of them.
    heads: J.
  """

  name: ClassVar[str] = "indexer"
  paper: ClassVar[str] = "https://arxiv.org/abs/2512.02556"
  neutral: ClassVar[str] = "indexer:k=1048576"
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
      "query": ("fsdp", None, None),
      "key": ("fsdp", None),
      "weight": ("fsdp", None),
  }

  k: int = 2048
  block: int = 1
  heads: int = 4

  def __post_init__(self):
    require.at_least("indexer: heads", self.heads, 1)
    if self.block < 1 or self.k < self.block or self.k % self.block:
      raise errors.UserError(
          f"indexer: k={self.k} must be a multiple of block={self.block}."
      )

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns `query` [D, J, E], `key` [D, E] and `weight` [D, J]."""
    width, size = config.embed_dim, config.head_dim
    shapes = {
        "query": (width, self.heads, size),
        "key": (width, size),
        "weight": (width, self.heads),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: width**-0.5 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

  def index(self, params: hooks.Params, call: hooks.Call) -> index_search.Index:
    """Queries, weights of their heads, and keys, of the call's tokens."""
    queries = index_search.queries(params, call)
    return *queries, index_search.keys(params, call)

  def select(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B S K H"],
      mask: masks.Mask,
  ) -> selection.Selection:
    """Returns the blocks of each query, the same for all heads."""
    index = self.index(params, call)
    return index_search.select(index, mask, self.k, self.block)

  def losses(
      self, params: hooks.Params, call: hooks.Call, made: hooks.Made
  ) -> dict[str, Float[Array, ""]]:
    """Returns how far the index is from attention."""
    index = self.index(params, call)
    return {
        "index": indexer_loss.distance(index_search.scores, index, call, made)
    }

  def init_summary(
      self, config: configs.TransformerConfig, batch_size: int, num_blocks: int
  ) -> Float[Array, "B S E"]:
    """Index keys of all tokens."""
    shape = (batch_size, num_blocks * self.block, config.head_dim)
    return jnp.zeros(shape)

  def summarize(
      self,
      summary: Float[Array, "B S E"],
      call: hooks.Call,
      key: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
  ) -> Float[Array, "B S E"]:
    """Adds the index keys of new tokens."""
    new = index_search.keys(call.params[self.name], call)
    place = jnp.where(positions < 0, summary.shape[1], positions)
    rows = jnp.arange(len(summary))[:, None]
    return summary.at[rows, place].set(new, mode="drop")

  def choose_by(
      self,
      query: Float[Array, "B K G H"],
      kept: Float[Array, "B S E"],
      position: Int[Array, "B"],
      call: hooks.Call,
  ) -> tuple[Int[Array, "B K W"], Bool[Array, "B K W"]]:
    """Returns what one query a sequence reads, the same for all heads."""
    own = index_search.queries(call.params[self.name], call)
    scores = index_search.scores(*own, kept)
    found = index_search.best(scores, position[:, None], self.k, self.block)
    shape = (*query.shape[:2], found[0].shape[-1])
    blocks, is_valid = (jnp.broadcast_to(x, shape) for x in found)
    return blocks, is_valid
