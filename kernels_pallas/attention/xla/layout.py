"""Cuts arrays into strips of queries and tiles of keys, and puts them together.

Letters: B batch, T queries, S keys, N query heads, K key heads, H head size; U
heads that strips are made of (K, or N where the heads of a group read different
keys), G query heads in a strip, R blocks of queries, C tiles of keys; I strips
in the order (B, U, R).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """Sizes of an attention and of its pieces.

  Attributes:
    batch_size: B.
    num_queries: T.
    num_keys: S.
    num_heads: N.
    num_kv_heads: K.
    num_units: U.
    block_q: Queries in a block.
    block_kv: Keys in a tile.
  """

  batch_size: int
  num_queries: int
  num_keys: int
  num_heads: int
  num_kv_heads: int
  num_units: int
  block_q: int
  block_kv: int

  @property
  def group(self) -> int:
    """G."""
    return self.num_heads // self.num_units

  @property
  def num_rows(self) -> int:
    """R."""
    return -(-self.num_queries // self.block_q)

  @property
  def num_tiles(self) -> int:
    """C."""
    return -(-self.num_keys // self.block_kv)

  @property
  def num_strips(self) -> int:
    """I."""
    return self.batch_size * self.num_units * self.num_rows

  def split_queries(self, x: Float[Array, "B T N ..."]) -> jax.Array:
    """[B, T, N, ...] -> [I, G, block_q, ...], padded by 0."""
    rest = x.shape[3:]
    padding = self.num_rows * self.block_q - self.num_queries
    x = jnp.pad(x, [(0, padding if i == 1 else 0) for i in range(x.ndim)])
    x = x.reshape(
        self.batch_size,
        self.num_rows,
        self.block_q,
        self.num_units,
        self.group,
        *rest,
    )
    x = jnp.moveaxis(x, (3, 1, 4, 2), (1, 2, 3, 4))
    return x.reshape(self.num_strips, self.group, self.block_q, *rest)

  def join_queries(self, x: Float[Array, "I G block_q ..."]) -> jax.Array:
    """[I, G, block_q, ...] -> [B, T, N, ...]."""
    rest = x.shape[3:]
    x = x.reshape(
        self.batch_size,
        self.num_units,
        self.num_rows,
        self.group,
        self.block_q,
        *rest,
    )
    x = jnp.moveaxis(x, (1, 2, 3, 4), (3, 1, 4, 2))
    x = x.reshape(self.batch_size, -1, self.num_heads, *rest)
    return x[:, : self.num_queries]

  def split_keys(self, x: Float[Array, "B S K H"]) -> jax.Array:
    """[B, S, K, H] -> [B K C, block_kv H], padded by 0."""
    padding = self.num_tiles * self.block_kv - self.num_keys
    x = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))
    return x.swapaxes(1, 2).reshape(-1, self.block_kv * x.shape[3])

  def join_keys(self, x: Float[Array, "tiles size"]) -> jax.Array:
    """[B K C, H block_kv] -> [B, S, K, H]."""
    x = x.reshape(
        self.batch_size, self.num_kv_heads, self.num_tiles, -1, self.block_kv
    )
    x = x.transpose(0, 2, 4, 1, 3)
    x = x.reshape(self.batch_size, -1, *x.shape[3:])
    return x[:, : self.num_keys]

  def join_columns(self, x: Float[Array, "tiles size"]) -> jax.Array:
    """[B U C, G block_kv] -> [B, N, S]."""
    x = x.reshape(
        self.batch_size,
        self.num_units,
        self.num_tiles,
        self.group,
        self.block_kv,
    ).swapaxes(2, 3)
    return x.reshape(self.batch_size, self.num_heads, -1)[..., : self.num_keys]
