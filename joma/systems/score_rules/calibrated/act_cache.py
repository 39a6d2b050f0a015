"""The cache of calibrated attention: everything, and the prompt's columns.

Letters: B batch, T new tokens, C slots, N query heads, K key and value heads, G
= N / K, E columns, H head size.
"""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.systems import kept_whole
from joma.systems.score_rules.calibrated import columns
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
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
class ActCache(kept_whole.KeptWhole[Calibrating]):
  """A `hooks.KVCache` of one layer.

  Attributes:
    chosen: Columns of the first prompt, int32 [B, N, E]; -1 is none.
  """

  chosen: PyTree

  def read(
      self, new: kept_whole.New
  ) -> tuple[Float[Array, "B T N H"], "ActCache"]:
    """The first prompt chooses columns; what follows has them."""
    if new.is_step:
      return self._read(new.query, new.positions, new.options), self
    text = (new.query, new.key, new.value, new.positions)
    out, found = self.system.calibrated(*text, new.options)
    room = ((0, 0), (0, 0), (0, self.chosen.shape[-1] - found.shape[-1]))
    chosen = jnp.pad(found, room, constant_values=-1).astype(jnp.int32)
    return out, dataclasses.replace(self, chosen=chosen)

  def _read(
      self,
      query: Float[Array, "B 1 N H"],
      positions: Int[Array, "B 1"],
      options: hooks.AttentionOptions,
  ) -> Float[Array, "B 1 N H"]:
    kept = self.kept
    slots = jnp.arange(kept.key.shape[2])
    seen = slots[None] <= positions
    _, attn_logits = one_query.attend(
        query, kept.key, kept.value, seen[:, None], options
    )
    weights = one_query.weights(attn_logits, query, options)
    is_sink = (self.chosen[..., None] == slots[None, None, None]).any(axis=2)
    of_sinks = jnp.where(is_sink.reshape(weights.shape), weights, 0.0)
    mass = of_sinks.sum(axis=-1)
    weights = columns.calibrate(weights, of_sinks, mass, self.system.beta)
    weights = weights.astype(kept.value.dtype)
    out = jnp.einsum("BKGC,BKCH->BKGH", weights, kept.value)
    return out.reshape(query.shape).astype(query.dtype)


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
  return ActCache(system, kept, chosen)
