"""Blocks of R tokens, of which the last, not full yet, stands by itself.

Letters: B batch, K key and value heads, S tokens, C positions, M blocks, R
tokens of a block, H head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.inference.cache import cache_options
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from scansnap_jax.experiment import errors


def check_made(
    name: str,
    config: configs.TransformerConfig,
    layer: int,
    dtype: jax.typing.DTypeLike,
    options: cache_options.CacheOptions,
) -> None:
  """Refuses a cache of blocks that its policy cannot make.

  Args:
    name: The policy.
    config: Of the model.
    layer: Whose cache it is.
    dtype: Of the cache.
    options: Of the cache; the default ones are right.

  Raises:
    UserError: The keys' rotations change, options are not the default ones, or
      the type is no float.
  """
  full_cache.check_rotations_stay(name, config, layer)
  if options != cache_options.DEFAULT:
    raise errors.UserError(
        f"{name} keeps rotated keys at absolute positions, in blocks of its"
        " own: leave keys, positions and page_size as they are."
    )
  if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
    raise errors.UserError(
        f"dtype={jnp.dtype(dtype).name} of a {name} cache must be a float type,"
        " such as float32 or bfloat16."
    )


def cut(
    x: Float[Array, "B K S H"], num_blocks: int, size: int
) -> Float[Array, "B K M R H"]:
  """The first M blocks of a text."""
  shape = (*x.shape[:2], num_blocks, size, x.shape[-1])
  return x[:, :, : num_blocks * size].reshape(shape)


def last(
    x: Float[Array, "B K S H"], lengths: Int[Array, "B"], size: int
) -> Float[Array, "B K R H"]:
  """What is in the last block of each text: position p at p modulo R."""
  first = lengths // size * size
  index = first[:, None] + jnp.arange(size)[None]
  is_token = (index < lengths[:, None])[:, None, :, None]
  index = jnp.where(is_token[:, 0, :, 0], index, 0)[:, None, :, None]
  return jnp.where(is_token, jnp.take_along_axis(x, index, axis=2), 0)


def put(kept: Array, new: Array, index: Int[Array, "B"]) -> Array:
  """Replaces one entry of axis 2 a sequence; beyond the last one nothing."""
  batch, heads = kept.shape[:2]
  rows, columns = jnp.arange(batch)[:, None], jnp.arange(heads)[None]
  where = kept.at[rows, columns, index[:, None]]
  return where.set(new.astype(kept.dtype), mode="drop")


def joined(
    full: Float[Array, "B K S H"],
    recent: Float[Array, "B K R H"],
    positions: Int[Array, "B 1"],
    capacity: int,
) -> Float[Array, "B K C H"]:
  """All vectors, those of the block at `positions` from `recent`."""
  size, missing = recent.shape[2], capacity - full.shape[2]
  full = jnp.pad(full, ((0, 0), (0, 0), (0, max(missing, 0)), (0, 0)))
  slots = jnp.arange(capacity)
  is_last = slots[None] // size >= positions // size
  own = jnp.take(recent, slots % size, axis=2)
  full = full[:, :, :capacity].astype(recent.dtype)
  return jnp.where(is_last[:, None, :, None], own, full)


def is_seen(
    positions: Int[Array, "B 1"], capacity: int, options: hooks.AttentionOptions
) -> Bool[Array, "B 1 C"]:
  """Which positions the queries at `positions` see, as one key head's."""
  slots = jnp.arange(capacity)[None]
  seen = slots <= positions
  if options.window is not None:
    seen = seen & (slots > positions - options.window)
  return seen[:, None]
