"""The KV cache that keeps everything: slot s of a layer holds position s.

Shapes never change, so one compilation serves every length; donated, it is
written in place. Policies that evict are `hooks.KVCache`s too.

Letters: B batch, T new tokens, C capacity in positions, N query heads, K key
and value heads, G = N / K, H head size.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import layer_hooks
from joma.transformer import one_by_one
from joma.transformer.weighing import in_parts
from joma.transformer.weighing import one_query
from joma.transformer.weighing import rows
from kernels_pallas import masks
from kernels_pallas import output
from scansnap_jax.experiment import errors


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullCache:
  """Keys and values of one layer.

  Attributes:
    key: [B, K, C, H]; positions not written yet hold anything, for no query
      stands behind them.
    value: As key.
    keeps_raw: Keys are kept before rotation and turned at every call, for
      frequencies that change with the length of the text. Static.
  """

  key: PyTree
  value: PyTree
  keeps_raw: bool = dataclasses.field(default=False, metadata={"static": True})
  honours: ClassVar[tuple[str, ...]] = ("sinks", "keys", "weights")

  def kept_positions(self) -> None:
    """None: nothing leaves."""

  def num_positions(self) -> int:
    """Its slots: what comes behind them is lost."""
    return self.key.shape[2]

  def takes_pieces(self) -> bool:
    """Whether all frequencies are known before the text has ended."""
    return not self.keeps_raw

  def on_trial(self) -> "FullCache":
    """Takes tokens on trial as it takes all others."""
    return self

  def keep(self, counts: Int[Array, "B"]) -> "FullCache":
    """Itself: no query stands behind tokens that are taken back."""
    del counts
    return self

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "FullCache"]:
    """Writes T positions, then attends to all up to each query's own.

    A prompt has the frequencies of its end where they change with the length of
    the text; one that goes on, for each token those of the text so far.
    """
    arguments = (query, key, value, positions, rotate, options)
    if query.shape[1] == 1 or not self.keeps_raw:
      return self._attend(*arguments)
    return one_by_one.unless_new(
        (positions[:, 0] <= 0).all(),
        lambda: self._attend(*arguments),
        FullCache.attend,
        self,
        *arguments,
    )

  def _attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "FullCache"]:
    query = rotate(query, positions)
    if not self.keeps_raw:
      key = rotate(key, positions)
    # Written first: a token sees itself, and a prompt its own tokens.
    cache = self.write(key, value, positions)
    turned = cache._turned(positions, rotate) if self.keeps_raw else cache
    if query.shape[1] == 1:
      return _attend_one(query, turned, positions, options), cache
    rule = options.weights
    if rule is None or rule.is_softmax:
      made = attend_many(query, turned.key, turned.value, positions, options)
      return made.out, cache
    layer_hooks.check_implementation(rule, options.implementation)
    slots = jnp.arange(turned.key.shape[2])[None]
    out = rows.attend(
        query,
        turned.key.swapaxes(1, 2).astype(query.dtype),
        turned.value.swapaxes(1, 2).astype(query.dtype),
        spans_up_to(positions, options.window),
        options,
        (positions, slots),
    )
    return out, cache

  def _turned(
      self, positions: Int[Array, "B T"], rotate: hooks.Rotate
  ) -> "FullCache":
    """Rotates all keys as a text that ends at the last position has them."""
    slots = jnp.arange(self.key.shape[2])[None]
    # The rotation takes the length of the text from the greatest position.
    slots = jnp.where(slots <= positions.max(axis=1)[:, None], slots, -1)
    key = rotate(self.key.swapaxes(1, 2), slots).swapaxes(1, 2)
    return FullCache(key, self.value)

  def write(
      self,
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
  ) -> "FullCache":
    """Keeps keys and their values; padding, at -1, is dropped."""
    return dataclasses.replace(
        self,
        key=_write(self.key, key, positions),
        value=_write(self.value, value, positions),
    )


def init(
    config: configs.TransformerConfig,
    batch_size: int,
    capacity: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[Any, ...]:
  """Returns empty caches, one a layer: a system's own where it has one.

  Args:
    config: The model's.
    batch_size: B.
    capacity: C, positions of the longest text, prompt and continuation. A
      multiple of 8 fills whole tiles of a TPU; of other sizes libtpu may copy
      all keys or values in every step.
    dtype: Of keys and values.
  """
  shape = (batch_size, config.num_kv_heads, capacity, config.head_dim)
  is_rotary = config.positions == "rotary"

  def of_layer(layer: int) -> Any:
    keeps_raw = is_rotary and config.rope_of(layer).changes_with_length
    empty = lambda: FullCache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), keeps_raw
    )
    return layer_hooks.init_cache(
        config, layer, batch_size, capacity, dtype, empty
    )

  return tuple(of_layer(layer) for layer in range(config.num_layers))


def check_rotations_stay(
    name: str, config: configs.TransformerConfig, layer: int
) -> None:
  """Raises UserError if keys that `name` keeps rotated would have to turn."""
  kind = config.rope_of(layer)
  if config.positions == "rotary" and kind.changes_with_length:
    raise errors.UserError(
        f"{name} keeps rotated keys, which rope_type={kind.rope_type} turns"
        f" anew as the text grows: read the text at once, or without {name}."
    )


def of_rotated(
    name: str,
    config: configs.TransformerConfig,
    layer: int,
    batch_size: int,
    capacity: int,
    dtype: jax.typing.DTypeLike,
) -> FullCache:
  """Returns the empty cache of one layer for a system that keeps rotated keys.

  Args:
    name: Of the system, for the message.
    config: The model's.
    layer: Which, from 0.
    batch_size: B.
    capacity: C.
    dtype: Of keys and values.

  Raises:
    UserError: The model's rotary frequencies change with the text.
  """
  check_rotations_stay(name, config, layer)
  shape = (batch_size, config.num_kv_heads, capacity, config.head_dim)
  return FullCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def _write(
    kept: Float[Array, "B K C H"],
    new: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B K C H"]:
  """Padding, whose position is -1, falls outside and is dropped."""
  batch, num_kv_heads, capacity, _ = kept.shape
  slots = jnp.where(positions < 0, capacity, positions)
  return kept.at[
      jnp.arange(batch)[:, None, None],
      jnp.arange(num_kv_heads)[None, :, None],
      slots[:, None, :],
  ].set(new.swapaxes(1, 2).astype(kept.dtype), mode="drop")


def attend_many(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    positions: Int[Array, "B T"],
    options: hooks.AttentionOptions,
    **returns: Any,
) -> output.AttentionOutput:
  """A span of keys for each query, key s at position s: linear memory.

  Args:
    query: Rotated.
    key: Rotated.
    value: Of the keys.
    positions: Of the queries; -1, padding, sees nothing.
    options: Static.
    **returns: What else `api.attention` is to return.
  """
  return in_parts.attend(
      query,
      key.swapaxes(1, 2).astype(query.dtype),
      value.swapaxes(1, 2).astype(query.dtype),
      spans_up_to(positions, options.window),
      options,
      **returns,
  )


def spans_up_to(positions: Int[Array, "B T"], window: int | None) -> masks.Mask:
  """Keys s at positions s, up to each query's own; padding, -1, sees none."""
  stops = (positions + 1).astype(jnp.int32)
  starts = jnp.zeros_like(stops)
  if window is not None:
    starts = jnp.maximum(stops - window, 0)
  return masks.Mask(starts[:, None], stops[:, None])


def _attend_one(
    query: Float[Array, "B 1 N H"],
    cache: FullCache,
    positions: Int[Array, "B 1"],
    options: hooks.AttentionOptions,
) -> Float[Array, "B 1 N H"]:
  """One query a sequence: two products along the cache as it lies."""
  slots, last = jnp.arange(cache.key.shape[2])[None], positions
  is_seen = slots <= last
  if options.window is not None:
    is_seen = is_seen & (slots > last - options.window)
  rule, bias = options.weights, None
  if rule is not None and rule.bias is not None:
    bias = rule.bias(query, positions, slots)
    shape = (*query.shape[:1], query.shape[2], 1, slots.shape[1])
    bias = jnp.broadcast_to(bias, shape)
    bias = bias.reshape(len(query), cache.key.shape[1], -1, slots.shape[1])
  out, _ = one_query.attend(
      query, cache.key, cache.value, is_seen[:, None], options, bias
  )
  return out
