"""The cache of calibrated attention: everything, and the prompt's columns.

Letters: B batch, T new tokens, C slots, N query heads, K key and value heads, G
= N / K, E columns, H head size.
"""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import one_by_one
from joma.transformer.weighing import one_query


@runtime_checkable
class Calibrating(Protocol):
  """A system of this kind."""

  name: ClassVar[str]

  @property
  def beta(self) -> float:
    """Factor of the columns' weights."""
    ...

  def calibrated(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], Int[Array, "B N E"]]:
    """Attends to whole texts; returns the columns too."""
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActCache:
  """A `hooks.KVCache` of one layer.

  Attributes:
    kept: `full_cache.FullCache`.
    chosen: Columns of the first prompt, int32 [B, N, E]; -1 is none.
    system: Static.
  """

  kept: full_cache.FullCache
  chosen: PyTree
  system: Calibrating = dataclasses.field(metadata={"static": True})

  @property
  def honours(self) -> tuple[str, ...]:
    """Its system."""
    return (self.system.name,)

  def num_positions(self) -> int:
    """Those of what it keeps."""
    return self.kept.num_positions()

  def kept_positions(self) -> None:
    """None: nothing leaves."""

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "ActCache"]:
    """The first prompt chooses columns; what follows has them."""
    arguments = (query, key, value, positions, rotate, options)
    is_step = query.shape[1] == 1
    at_once = ActCache._step if is_step else ActCache._prompt
    return one_by_one.but_first(at_once, ActCache.attend, self, *arguments)

  def _prompt(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "ActCache"]:
    query, key = rotate(query, positions), rotate(key, positions)
    out, found = self.system.calibrated(query, key, value, positions, options)
    room = ((0, 0), (0, 0), (0, self.chosen.shape[-1] - found.shape[-1]))
    kept = self.kept.write(key, value, positions)
    chosen = jnp.pad(found, room, constant_values=-1).astype(jnp.int32)
    return out, dataclasses.replace(self, kept=kept, chosen=chosen)

  def _step(
      self,
      query: Float[Array, "B 1 N H"],
      key: Float[Array, "B 1 K H"],
      value: Float[Array, "B 1 K H"],
      positions: Int[Array, "B 1"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B 1 N H"], "ActCache"]:
    query, key = rotate(query, positions), rotate(key, positions)
    kept = self.kept.write(key, value, positions)
    slots = jnp.arange(kept.key.shape[2])
    seen = slots[None] <= positions
    _, attn_logits = one_query.attend(
        query, kept.key, kept.value, seen[:, None], options
    )
    weights = one_query.weights(attn_logits, query, options)
    is_sink = (self.chosen[..., None] == slots[None, None, None]).any(axis=2)
    of_sinks = jnp.where(is_sink.reshape(weights.shape), weights, 0.0)
    mass = of_sinks.sum(axis=-1, keepdims=True)
    is_all = mass > 1 - 1e-6
    rest = (1 - self.system.beta * mass) / jnp.where(is_all, 1.0, 1 - mass)
    scaled = self.system.beta * of_sinks + rest * (weights - of_sinks)
    weights = jnp.where(is_all, weights, scaled).astype(kept.value.dtype)
    out = jnp.einsum("BKGC,BKCH->BKGH", weights, kept.value)
    out = out.reshape(query.shape).astype(query.dtype)
    return out, dataclasses.replace(self, kept=kept)


def init(
    system: Calibrating,
    config: configs.TransformerConfig,
    layer: int,
    batch_size: int,
    capacity: int,
    dtype: jax.typing.DTypeLike,
    num_columns: int,
) -> ActCache:
  """Returns an empty cache of one layer.

  Raises:
    UserError: The model's rotary frequencies change with the text, and keys are
      kept rotated.
  """
  kept = full_cache.of_rotated(
      system.name, config, layer, batch_size, capacity, dtype
  )
  chosen = jnp.full((batch_size, config.num_heads, num_columns), -1, jnp.int32)
  return ActCache(kept, chosen, system)
