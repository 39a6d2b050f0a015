"""The cache of differential attention: everything, read by pairs of heads.

Letters: B batch, T new tokens, C slots, N query heads, K key and value heads, P
= K / 2 pairs of key heads, G = N / K, H head size.
"""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.systems import kept_whole
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer.weighing import one_query
from kernels_pallas.attention import api


@runtime_checkable
class Paired(Protocol):
  """A system of this kind."""

  name: ClassVar[str]

  def finish(
      self, params: hooks.Params, layer: int, read: Float[Array, "B T N _"]
  ) -> Float[Array, "B T N H"]:
    """Returns the heads' outputs of what each read of its pair's values."""
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DifferentialCache(kept_whole.KeptWhole[Paired]):
  """A `hooks.KVCache` of one layer; it reads pieces as it reads prompts."""

  # A query reads what lies before it, whatever the call.
  attend = kept_whole.KeptWhole.take

  def takes_pieces(self) -> bool:
    """Always."""
    return True

  def read(
      self, new: kept_whole.New
  ) -> tuple[Float[Array, "B T N H"], "DifferentialCache"]:
    """Attends to all up to each query's own position."""
    of_pairs = _step if new.is_step else _prompt
    found = of_pairs(new.query, self.kept, new.positions, new.options)
    params = new.call.params[self.system.name]
    return self.system.finish(params, new.call.layer, found), self


def init(
    system: Paired,
    config: configs.TransformerConfig,
    layer: int,
    batch_size: int,
    capacity: int,
    dtype: jax.typing.DTypeLike,
) -> DifferentialCache:
  """Returns an empty cache of one layer."""
  kept = full_cache.of_rotated(
      system.name, config, layer, batch_size, capacity, dtype
  )
  return DifferentialCache(system, kept)


def of_pairs(value: Float[Array, "B T K H"]) -> Float[Array, "B T K _"]:
  """Values of both heads of a pair, 2 H wide, for each of the two."""
  both = jnp.concatenate(jnp.split(value, 2, axis=2), axis=-1)
  return jnp.concatenate([both, both], axis=2)


def read_pairs(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K _"],
    where: hooks.Where,
    options: hooks.AttentionOptions,
) -> Float[Array, "B T N _"]:
  """What heads read of the values of their pairs."""
  return api.attention(
      query,
      key,
      value,
      where=where,
      scale=options.scale,
      logits_soft_cap=options.logits_soft_cap,
      implementation=options.implementation,
  ).out


def _prompt(
    query: Float[Array, "B T N H"],
    kept: full_cache.FullCache,
    positions: Int[Array, "B T"],
    options: hooks.AttentionOptions,
) -> Float[Array, "B T N _"]:
  key, value = (
      x.swapaxes(1, 2).astype(query.dtype) for x in (kept.key, kept.value)
  )
  where = full_cache.spans_up_to(positions, options.window)
  return read_pairs(query, key, of_pairs(value), where, options)


def _step(
    query: Float[Array, "B 1 N H"],
    kept: full_cache.FullCache,
    positions: Int[Array, "B 1"],
    options: hooks.AttentionOptions,
) -> Float[Array, "B 1 N _"]:
  """Weights once, and both halves of the values as they lie."""
  slots = jnp.arange(kept.key.shape[2])[None]
  seen = slots <= positions
  if options.window is not None:
    seen &= slots > positions - options.window
  _, attn_logits = one_query.attend(
      query, kept.key, kept.value, seen[:, None], options
  )
  weights = one_query.weights(attn_logits, query, options)
  batch, num_kv_heads, group, capacity = weights.shape
  pairs = (batch, 2, num_kv_heads // 2)
  weights = weights.reshape(*pairs, group, capacity).astype(kept.value.dtype)
  value = kept.value.reshape(*pairs, capacity, -1)
  # Both heads of a pair, i, read both halves of its values, j.
  read = jnp.einsum("BiPGC,BjPCH->BiPGjH", weights, value)
  read = read.reshape(batch, 1, query.shape[2], 2 * query.shape[3])
  return read.astype(query.dtype)
