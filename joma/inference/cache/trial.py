"""Tokens that a cache takes on trial, of which only the first may stay.

A slot cache is copied, and notes of each token which slots it took, its vectors
as they are kept there, and all that is a number a slot or a row a sequence.
Those that stay are written into the copy, so that the cache is what it would be
had the others never come, bit for bit.

Letters: B batch, T tokens on trial, N query heads, K key and value heads, C
slots, H head size.
"""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.inference.cache import calls
from joma.inference.cache import storage
from joma.transformer import hooks
from joma.transformer import one_by_one
from scansnap_jax.experiment import errors


@runtime_checkable
class OnTrial(hooks.KVCache, Protocol):
  """A cache that has taken tokens on trial, all in one call."""

  def keep(self, counts: Int[Array, "B"]) -> hooks.KVCache:
    """Returns the cache with the first tokens of the call alone.

    Args:
      counts: How many of each sequence stay, from 0.
    """
    ...


@runtime_checkable
class TakesBack(Protocol):
  """A cache from which the newest tokens can be taken back."""

  def on_trial(self) -> OnTrial:
    """Returns it as it takes tokens on trial."""
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Notes:
  """What each token on trial has changed.

  Attributes:
    kept: Keys and values before the first.
    numbers: Those of slots and sequences before the first token and after each,
      [T + 1, B, ...] each.
    slots: Where each token was written, C for nowhere, int32 [T, B, K].
    vectors: Keys and values as they were written, [T, B, K, ...] each.
    num_taken: Tokens so far, int32.
  """

  kept: PyTree
  numbers: PyTree
  slots: storage.Leaf
  vectors: PyTree
  num_taken: storage.Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotTrial:
  """A `kv_cache.SlotCache` that takes tokens on trial; an `OnTrial`.

  Attributes:
    slots: The cache.
    notes: None before the call.
  """

  slots: Any
  notes: Notes | None = None
  honours: ClassVar[tuple[str, ...]] = ("sinks", "keys")

  def reads_call(self) -> bool:
    """Whether the policy looks at the layer's input."""
    return calls.uses_input(self.slots.policy)

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "SlotTrial"]:
    """Takes the tokens one by one, as steps would, and notes what changes."""
    noting = SlotTrial(self.slots, _blank(self.slots, query.shape[1]))
    return one_by_one.attend(
        SlotTrial._take, noting, query, key, value, positions, rotate, options
    )

  def keep(self, counts: Int[Array, "B"]) -> Any:
    """Writes the first tokens into what was kept before them."""
    notes = self.notes
    assert notes is not None  # Nothing was taken on trial.

    def write(at: Int[Array, ""] | int, kept: PyTree) -> PyTree:
      stays = (at < counts)[:, None]
      index = _index(jnp.where(stays, notes.slots[at], self.slots.capacity))
      return jax.tree.map(
          lambda x, new: x.at[index].set(new[at], mode="drop"),
          kept,
          notes.vectors,
      )

    key, value = jax.lax.fori_loop(0, len(notes.slots), write, notes.kept)
    rows = jnp.arange(len(counts))
    numbers = jax.tree.map(lambda x: x[counts, rows], notes.numbers)
    return dataclasses.replace(self.slots, key=key, value=value, **numbers)

  def _take(
      self,
      query: Float[Array, "B 1 N H"],
      key: Float[Array, "B 1 K H"],
      value: Float[Array, "B 1 K H"],
      positions: Int[Array, "B 1"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B 1 N H"], "SlotTrial"]:
    notes, old = self.notes, self.slots
    assert notes is not None  # `attend` has made them.
    out, new = old.attend(query, key, value, positions, rotate, options)
    position, at = positions[:, 0, None, None], notes.num_taken
    is_new = (new.pos == position) & (position >= 0)
    slot = jnp.where(is_new.any(axis=-1), is_new.argmax(axis=-1), old.capacity)
    vectors = jax.tree.map(
        lambda x: x.at[_index(slot)].get(mode="clip"), _vectors(new)
    )
    write = lambda x, y: x.at[at].set(y.astype(x.dtype))
    notes = dataclasses.replace(
        notes,
        numbers=jax.tree.map(
            lambda x, y: x.at[at + 1].set(y), notes.numbers, _numbers(new)
        ),
        slots=write(notes.slots, slot),
        vectors=jax.tree.map(write, notes.vectors, vectors),
        num_taken=at + 1,
    )
    return out, SlotTrial(new, notes)


def begin(kv_cache: PyTree) -> tuple[Any, ...]:
  """Returns caches, one a layer, that take tokens on trial."""
  return tuple(cache.on_trial() for cache in kv_cache)


def keep(caches: PyTree, counts: Int[Array, "B"]) -> tuple[Any, ...]:
  """Returns caches of `begin` after a call, with its first tokens alone."""
  return tuple(cache.keep(counts) for cache in caches)


def check(kv_cache: PyTree) -> None:
  """Raises UserError if tokens cannot be taken back from a layer's cache."""
  from joma.systems.cache_policies import names

  for layer, cache in enumerate(kv_cache):
    policy = getattr(cache, "policy", None)
    merges = policy is not None and calls.merges(policy)
    if merges or not isinstance(cache, TakesBack):
      name = type(cache).__name__ if policy is None else names.name_of(policy)
      raise errors.UserError(
          f"the cache of layer {layer}, {name}, cannot give tokens back, which"
          " a draft needs: decode without one, or keep everything or slots, as"
          " full, h2o or window do."
      )


def _blank(slots: Any, length: int) -> Notes:
  """Notes for so many tokens; before the first all is as it is."""
  shape = slots.pos.shape[:2]
  return Notes(
      kept=_vectors(slots),
      numbers=jax.tree.map(
          lambda x: jnp.repeat(x[None], length + 1, axis=0), _numbers(slots)
      ),
      slots=jnp.full((length, *shape), slots.capacity, jnp.int32),
      vectors=jax.tree.map(
          lambda x: jnp.zeros((length, *shape, *x.shape[3:]), x.dtype),
          _vectors(slots),
      ),
      num_taken=jnp.int32(0),
  )


def _vectors(slots: Any) -> PyTree:
  return slots.key, slots.value


def _numbers(slots: Any) -> dict[str, PyTree]:
  names = ("score", "pos", "rank", "aux", "state")
  return {name: getattr(slots, name) for name in names}


def _index(slot: Int[Array, "B K"]) -> tuple[Array, Array, Array]:
  batch, num_kv_heads = slot.shape
  heads = jnp.arange(num_kv_heads)[None, :]
  return jnp.arange(batch)[:, None], heads, slot
