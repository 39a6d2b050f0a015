"""Codes whose groups are whole blocks and whole values, as the op has them.

Where a block has as many tokens and a value as many numbers as the TPU's kernel
takes (`kernels_pallas.decode.coded`), `kivi` keeps codes in the order in which
the op reads them, and a step reads them as they are: nothing is decoded into
memory.

Letters: B batch, N query heads, K key and value heads, M blocks of R tokens, H
head size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.inference.cost import cache_plan
from joma.transformer import hooks
from joma.transformer import sharding
from kernels_pallas.decode.coded import api
from kernels_pallas.decode.coded import codes

# Of keys, and of values.
Pair = tuple[codes.Blocks, codes.Blocks]


def fit(num_exact: int, group_size: int, capacity: int, head_dim: int) -> bool:
  """Whether codes of such sizes are those of the kernel, a block at least."""
  is_whole = num_exact == group_size
  of_value = cache_plan.value_group(head_dim, group_size)
  fits = api.fits_tpu(num_exact, head_dim) and of_value == head_dim
  return is_whole and fits and capacity >= num_exact


def empty(
    shape: tuple[int, int, int, int, int], dtype: jax.typing.DTypeLike
) -> Pair:
  """Returns codes of zeros for blocks [B, K, M, R, H]."""
  batch, heads, num_blocks, size, head_dim = shape
  lead = (batch, num_blocks, heads)
  data = lambda *rest: jnp.zeros((*lead, *rest), jnp.uint8)
  of_group = lambda n: jnp.zeros((*lead, n), dtype)
  return (
      codes.Blocks(
          data(head_dim // 2, size), of_group(head_dim), of_group(head_dim)
      ),
      codes.Blocks(data(size // 2, head_dim), of_group(size), of_group(size)),
  )


def encode(
    key: Float[Array, "B K M R H"],
    value: Float[Array, "B K M R H"],
    dtype: jax.typing.DTypeLike,
) -> Pair:
  """Returns the codes of blocks."""
  keys = codes.encode(key.swapaxes(1, 2), "tokens", dtype)
  return keys, codes.encode(value.swapaxes(1, 2), "channels", dtype)


def decode(
    key: codes.Blocks, value: codes.Blocks
) -> tuple[Float[Array, "B K M R H"], Float[Array, "B K M R H"]]:
  """Returns the keys and values, float32."""
  keys = codes.decode(key, "tokens").swapaxes(1, 2)
  return keys, codes.decode(value, "channels").swapaxes(1, 2)


def put(kept: Pair, new: Pair, block: Int[Array, "B"]) -> Pair:
  """Replaces a block of each sequence; beyond the last one nothing."""
  rows = jnp.arange(len(block))
  write = lambda x, y: x.at[rows, block].set(y[:, 0], mode="drop")
  return jax.tree.map(write, kept, new)


def is_plain(options: hooks.AttentionOptions) -> bool:
  """Whether the op is all that attention does: softmax, over all tokens."""
  nothing = (options.weights, options.logits_soft_cap, options.window)
  return all(x is None for x in nothing)


def attend(
    query: Float[Array, "B 1 N H"],
    kept: Pair,
    newest: tuple[Float[Array, "B K R H"], Float[Array, "B K R H"]],
    positions: Int[Array, "B 1"],
    options: hooks.AttentionOptions,
) -> Float[Array, "B 1 N H"]:
  """Attends to full blocks and the newest one, each device to its heads."""
  step = functools.partial(
      api.attend, scale=options.scale, implementation=options.implementation
  )
  leaves, treedef = jax.tree.flatten(kept)

  def of_part(query: Array, *arrays: Any) -> Array:
    *blocks, key, value, positions = arrays
    keys, values = jax.tree.unflatten(treedef, blocks)
    return step(query, keys, values, key, value, positions)

  labels = ["b.n" + "." * (leaf.ndim - 3) for leaf in leaves]
  out = sharding.per_head(
      of_part,
      (query[:, 0], *leaves, *newest, positions[:, 0]),
      ["bn.", *labels, "bn..", "bn..", "b"],
      "bn.",
  )
  return out[:, None]
