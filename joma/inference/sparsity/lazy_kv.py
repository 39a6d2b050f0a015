"""A full KV cache whose keys and values are made when a head needs them.

A token that leaves out a head leaves out its key and value. The inputs of the
last R tokens are kept, with which keys and values they lack: a head that is
chosen computes those first, and every R-th step all heads do, so that nothing
is missing when inputs are overwritten. A chosen head therefore attends to the
same keys and values as if all had always been computed, and after a flush the
cache holds the same. Deja Vu (https://arxiv.org/abs/2310.17157) keeps 16.

Rotary frequencies that depend on the length of the text so far are taken at the
step that makes a key.

Letters: B batch, R kept inputs, D width, N heads, K KV heads, C capacity, H
size of a head.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.inference.cache import storage
from joma.transformer import full_cache
from joma.transformer import hooks
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LazyKV:
  """Cache and kept inputs of one layer.

  Attributes:
    full: Keys and values; 0 where they are missing.
    x: Inputs of attention, [B, R, D].
    positions: Of the tokens, [B, R]; -1 where none is kept.
    missing: Whose key and value are missing, [B, R, K].
    num_steps: Tokens taken in so far.
    step: What the step at hand computes, (x [B, D], [B, K]); None between.
  """

  full: full_cache.FullCache
  x: storage.Leaf
  positions: storage.Leaf
  missing: storage.Leaf
  num_steps: storage.Leaf
  step: storage.Leaf = None
  honours: ClassVar[tuple[str, ...]] = full_cache.FullCache.honours

  @property
  def is_flush(self) -> Bool[Array, "1 1"]:
    """Whether the next step computes everything."""
    period = self.x.shape[1]
    return (self.num_steps % period == period - 1).reshape(1, 1)

  def with_step(
      self, x: Float[Array, "B D"], computed: Bool[Array, "B K"]
  ) -> "LazyKV":
    """Tells what the step at hand reads and which KV heads it computes."""
    return dataclasses.replace(self, step=(x, computed))

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B S K H"],
      value: Float[Array, "B S K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "LazyKV"]:
    """Fills in what is missing, then attends.

    A prompt cannot fill in what steps before it left out: where keys are still
    missing its outputs are NaN, which no token is drawn from.

    Args:
      query: Of T new tokens.
      key: Of the same; in a step of one token, of the kept inputs before it.
      value: Likewise.
      positions: Of the new tokens.
      rotate: As in `hooks.KVCache`.
      options: As there.
    """
    if self.step is None:
      out, full = self.full.attend(
          query, key, value, positions, rotate, options
      )
      is_missing = self.missing & (self.positions >= 0)[..., None]
      lacks = is_missing.any(axis=(1, 2))[:, None, None, None]
      out = jnp.where(lacks, jnp.nan, out)
      return out, dataclasses.replace(self, full=full)
    x, computed = self.step
    filled = self._fill(rotate(key[:, :-1], self.positions), value[:, :-1])
    new = lambda y: jnp.where(computed[:, None, :, None], y[:, -1:], 0)
    out, full = filled.attend(
        query, new(key), new(value), positions, rotate, options
    )
    return out, self._push(full, x, positions[:, 0], computed)

  def _fill(self, key: Array, value: Array) -> full_cache.FullCache:
    _, computed = self.step
    is_due = self.missing & computed[:, None] & (self.positions >= 0)[..., None]
    capacity = self.full.key.shape[2]
    # What is not due falls outside and is dropped.
    slots = jnp.where(is_due, self.positions[..., None], capacity)
    slots = slots.swapaxes(1, 2)  # [B, K, R]
    batch, num_kv_heads, _ = slots.shape

    def put(
        kept: Float[Array, "B K C H"], new: Float[Array, "B R K H"]
    ) -> Float[Array, "B K C H"]:
      return kept.at[
          jnp.arange(batch)[:, None, None],
          jnp.arange(num_kv_heads)[None, :, None],
          slots,
      ].set(new.swapaxes(1, 2).astype(kept.dtype), mode="drop")

    return full_cache.FullCache(
        put(self.full.key, key), put(self.full.value, value)
    )

  def _push(
      self,
      full: full_cache.FullCache,
      x: Float[Array, "B D"],
      position: Int[Array, "B"],
      computed: Bool[Array, "B K"],
  ) -> "LazyKV":
    # A ring: the oldest input is overwritten; the flush made what it lacked.
    slot = self.num_steps % self.x.shape[1]
    missing = self.missing & ~computed[:, None]
    return LazyKV(
        full=full,
        x=self.x.at[:, slot].set(x.astype(self.x.dtype)),
        positions=self.positions.at[:, slot].set(position),
        missing=missing.at[:, slot].set(~computed),
        num_steps=self.num_steps + 1,
    )


def init(cache: object, period: int, embed_dim: int) -> LazyKV:
  """Wraps an empty full cache.

  Args:
    cache: A `FullCache`.
    period: R, inputs that are kept.
    embed_dim: D.

  Raises:
    UserError: If it is another cache, or keeps keys before rotation, or R is
      less than 1.
  """
  require.at_least("period", period, 1)
  if not isinstance(cache, full_cache.FullCache):
    raise errors.UserError(
        "missing_kv=recompute fills in old keys and values, which a"
        f" {type(cache).__name__} may have evicted: it wants a FullCache."
    )
  if cache.keeps_raw:
    raise errors.UserError(
        "missing_kv=recompute fills in rotated keys, which frequencies that"
        " change with the length of the text turn anew: use another way."
    )
  batch, num_kv_heads, _, _ = cache.key.shape
  return LazyKV(
      full=cache,
      x=jnp.zeros((batch, period, embed_dim), cache.key.dtype),
      positions=jnp.full((batch, period), -1, jnp.int32),
      missing=jnp.zeros((batch, period, num_kv_heads), bool),
      num_steps=jnp.zeros((), jnp.int32),
  )
