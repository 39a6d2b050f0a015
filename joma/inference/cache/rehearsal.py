"""Texts that are read twice, so that the second reading says what stays.

  caches = prepare(kv_cache.init(policy, ...), lengths)
  rows, whole = repeat(rows, lengths, request)
  _, caches = model.apply(..., rows, kv_cache=caches)

Text, request and repetition are one causal prompt; of it only the text's own
tokens stay. For policies without a rehearsal (`rules.Rehearses`) caches are as
they were.

Letters: B batch, T tokens of a text, R of a request, N query heads, K key and
value heads, H head size.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.cache import prompts
from joma.inference.cache import storage
from joma.inference.cache import tokens
from joma.transformer import hooks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RehearsalCache:
  """An empty cache that is about to read a text twice; a `hooks.KVCache`.

  Attributes:
    slots: Of one layer, empty.
    starts: Int32 [B], tokens of each text.
  """

  slots: kv_cache.SlotCache
  starts: storage.Leaf
  honours: ClassVar[tuple[str, ...]] = kv_cache.SlotCache.honours

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], kv_cache.SlotCache]:
    """Attends to everything; returns the slots with what stays of the text."""
    slots, policy = self.slots, self.slots.policy
    new = tokens.Tokens(query, key, value, positions, rotate, options)
    result, prompt = prompts.read(
        new,
        policy,
        layer=slots.layer,
        capacity=slots.capacity,
        is_raw=slots.options.keys == "raw",
    )
    prompt = dataclasses.replace(prompt, starts=self.starts)
    prompted = calls.read_prompt(policy, prompt)
    is_text = positions < self.starts[:, None]
    text = dataclasses.replace(
        prompt,
        positions=jnp.where(is_text, positions, -1),
        lengths=self.starts,
    )
    return result.out, kv_cache.keep(slots, text, prompted)


def prepare(
    caches: tuple[Any, ...], lengths: Int[Array, "B"]
) -> tuple[Any, ...]:
  """Returns caches that read a text twice where their policies do so.

  Args:
    caches: Empty, one a layer.
    lengths: Tokens of each text.
  """
  return tuple(
      RehearsalCache(cache, lengths)
      if isinstance(cache, kv_cache.SlotCache)
      and calls.request(cache.policy) is not None
      else cache
      for cache in caches
  )


def are_rehearsing(caches: tuple[Any, ...]) -> bool:
  """Returns whether a text is to be read twice."""
  return any(isinstance(cache, RehearsalCache) for cache in caches)


def repeat(
    rows: Int[Array, "B T"], lengths: Int[Array, "B"], request: Sequence[int]
) -> tuple[Int[Array, "B _"], Int[Array, "B"]]:
  """Returns texts, each with the request and itself behind, and their lengths.

  Args:
    rows: Padded at their ends.
    lengths: Tokens of each.
    request: R tokens.
  """
  asked = jnp.array(request, jnp.int32)
  size = len(request)
  whole = 2 * lengths + size
  at = jnp.arange(2 * rows.shape[1] + size)[None] - lengths[:, None]
  again = jnp.take_along_axis(
      rows, jnp.clip(at - size, 0, rows.shape[1] - 1), axis=1
  )
  padding = ((0, 0), (0, at.shape[1] - rows.shape[1]))
  between = asked[jnp.clip(at, 0, size - 1)] if size else again
  found = jnp.where(at < size, between, again)
  return jnp.where(at < 0, jnp.pad(rows, padding), found), whole
