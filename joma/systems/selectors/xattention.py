"""XAttention: blocks of a prompt by the sums of their antidiagonals.

Queries and keys are cut into groups of `stride`. The logit of a group of
queries r and one of keys c is the sum along the antidiagonal of their tile,

  logit_rc = scale / m sum_i q_(r m + m - 1 - i) k_(c m + i),    m = stride

which meets every row and every column of the tile once. Softmax over c <= r,
summed over the groups of a block of queries and of a block of keys, is the
block's mass; the fewest blocks that hold `threshold` of it are read, the first
and a query's own always (https://arxiv.org/abs/2503.16428). The choice costs
1 / stride of the logits. It is a rule for prompts: a step reads everything.

Letters: B batch, T queries, S keys, N query heads, K key and value heads, G =
N / K, H head size, C blocks, R groups of a block, M groups, W blocks that are
read, J = stride H.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.systems.selectors import block_cache
from joma.transformer import config as configs
from joma.transformer import hooks
from kernels_pallas import masks
from kernels_pallas import selection
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class XAttention:
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
    num_kv_heads, num_blocks = key.shape[2], -(-length // size)
    fill = lambda x: jnp.pad(
        jax.lax.stop_gradient(x),
        ((0, 0), (0, num_blocks * size - length), (0, 0), (0, 0)),
    )
    query, key = fill(query), fill(key)
    shape = (batch, num_blocks, size // self.stride, self.stride)
    # Reversed in each group: the product of two rows is an antidiagonal's sum.
    query = query.reshape(*shape, num_kv_heads, -1, query.shape[-1])[
        :, :, :, ::-1
    ]
    query = query.transpose(1, 0, 4, 5, 2, 3, 6)
    query = query.reshape(*query.shape[:5], -1)  # [C, B, K, G, R, J]
    key = key.reshape(batch, -1, self.stride, num_kv_heads, key.shape[-1])
    key = key.transpose(0, 3, 1, 2, 4).reshape(
        batch, num_kv_heads, key.shape[1], -1
    )

    def find(one: tuple[Array, Array]) -> tuple[Array, Array]:
      # One block of queries at a time: no array is of groups by groups.
      own, query = one
      mass = self._mass(query, key, own, call.options.scale)
      return self._fewest(mass.reshape(batch, num_heads, -1), own)

    blocks, is_valid = jax.lax.map(find, (jnp.arange(num_blocks), query))
    return selection.Selection(
        jnp.moveaxis(blocks, 0, 2),
        jnp.moveaxis(is_valid, 0, 2).sum(axis=-1).astype(jnp.int32),
        mask,
        size,
        size,
    )

  def _mass(
      self,
      query: Float[Array, "B K G R J"],
      key: Float[Array, "B K M J"],
      own: Int[Array, ""],
      scale: float,
  ) -> Float[Array, "B K G C"]:
    """Share of each block of keys in the mass of one block of queries."""
    groups = query.shape[3]
    logits = jnp.einsum(
        "BKGRJ,BKMJ->BKGRM", query, key, preferred_element_type=jnp.float32
    )
    row = (own * groups + jnp.arange(groups))[:, None]
    is_seen = jnp.arange(key.shape[2])[None] <= row
    logits = logits * (scale / self.stride)
    logits = jnp.where(is_seen[None, None, None], logits, -jnp.inf)
    mass = jax.nn.softmax(logits).mean(axis=3)
    return mass.reshape(*mass.shape[:3], -1, groups).sum(axis=-1)

  def _fewest(
      self, mass: Float[Array, "B N C"], own: Int[Array, ""]
  ) -> tuple[Int[Array, "B N W"], Bool[Array, "B N W"]]:
    """The heaviest blocks until they hold the threshold, its own first."""
    block = masks.to_rank(jnp.arange(mass.shape[-1]), 3)
    rank = jnp.where(block == 0, 2.0, mass)
    rank = jnp.where(block == own, 3.0, rank)
    rank = jnp.where(block <= own, rank, -jnp.inf)
    width = min(self.k or mass.shape[-1], mass.shape[-1])
    best, blocks = jax.lax.top_k(rank, width)
    is_valid = best > -jnp.inf
    if self.threshold < 1:
      held = jnp.take_along_axis(mass, blocks, axis=-1)
      before = jnp.cumsum(held, axis=-1) - held
      is_valid &= (before < self.threshold) | (best > 1.5)
    return blocks.astype(jnp.int32), is_valid

  def choose_by(
      self,
      query: Float[Array, "B K G H"],
      summary: None,
      position: Int[Array, "B"],
      call: hooks.Call,
  ) -> None:
    """None: a step reads everything."""

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> hooks.KVCache:
    """Returns an empty cache of everything."""
    return block_cache.init(self, config, batch_size, capacity, dtype)
