"""A mixture of heads that routes blocks of queries, so that kernels skip.

Gates as in `moh`, of the first token of each block, for all of the block: later
ones may not choose for it. A head that a block has not chosen visits no tile of
keys: of the tiles of attention (shared + active) / N are computed, on every
implementation of the op. A step of decoding computes all heads and closes the
gates of those that are not chosen; its cache keeps the gates of the block.

Paper's settings: 50 to 90 % of the heads, chosen by token.

Letters: B batch, T queries, R blocks of queries, D width, N query heads, K key
and value heads, H head size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.systems.routers import head_gates
from joma.systems.routers import moh
from joma.systems.routers import moh_blocks_cache
from joma.transformer import attention
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import sharding
from joma.transformer.weighing import merged
from kernels_pallas import masks
from kernels_pallas import selection
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class MohBlocks:
  """A mixer: attention by the heads that a block has chosen.

  Attributes:
    shared: Heads that every block has, the first ones.
    active: Heads of the others that a block has.
    block: Queries of a block, and keys of a tile.
    cost: Factor of the loss of balance.
    start: Standard deviation of W before training, times the square root of D.
  """

  name: ClassVar[str] = "moh_blocks"
  paper: ClassVar[str] = "https://arxiv.org/abs/2410.11842"
  neutral: ClassVar[str] = "moh_blocks:active=1048576:start=0"
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = moh.Moh.axes

  shared: int = 1
  active: int = 2
  block: int = 256
  cost: float = 0.01
  start: float = 1.0

  def __post_init__(self):
    require.at_least("moh_blocks: block", self.block, 1)
    head_gates.check(
        "moh_blocks", self.shared, self.active, self.cost, self.start
    )

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns the parameters of `moh`."""
    return head_gates.draw(self.name, key, config, self.shared, self.start)

  def mix(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      mask: masks.Mask,
  ) -> Float[Array, "B T N H"]:
    """Returns the heads' outputs of whole texts, by their gates."""
    length = query.shape[1]
    gates = head_gates.gates_of(params, call.x[:, :: self.block], self.active)
    mask = attention.with_window(mask, length, call.options.window)
    query = call.rotate(query, call.positions)
    key = call.rotate(key, call.positions)
    attend = lambda query, key, value, where: merged.attend(
        query, key, value, where, call.options
    ).out
    where = self.select(gates, mask, length)
    out = sharding.per_part(attend, query, key, value, where)
    gates = jnp.repeat(gates, self.block, axis=1)[:, :length]
    return gates[..., None].astype(out.dtype) * out

  def select(
      self, gates: Float[Array, "B R N"], mask: masks.Mask, length: int
  ) -> selection.Selection:
    """Returns the mask's tiles, none of them for gates that are closed."""
    size = self.block
    every = selection.from_mask(
        mask, length, length, block_q=size, block_kv=size
    )
    heads = (len(gates), gates.shape[2], *every.num_valid.shape[2:])
    num_valid = jnp.where(
        jnp.moveaxis(gates, 2, 1) > 0, jnp.asarray(every.num_valid), 0
    )
    table = jnp.broadcast_to(
        jnp.asarray(every.block_table), (*heads, every.block_table.shape[-1])
    )
    return dataclasses.replace(every, block_table=table, num_valid=num_valid)

  def losses(
      self, params: hooks.Params, call: hooks.Call, made: hooks.Made
  ) -> dict[str, Float[Array, ""]]:
    """Returns the loss of balance over blocks, by its factor."""
    first = slice(None, None, self.block)
    is_token = call.positions[:, first] >= 0
    x = call.x[:, first]
    return {
        "balance": (
            self.cost * head_gates.imbalance(params, x, self.active, is_token)
        )
    }

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> hooks.KVCache:
    """Returns an empty cache, which keeps everything and the block's gates."""
    return moh_blocks_cache.init(
        self, config, layer, batch_size, capacity, dtype
    )
