"""The cache of superlinear attention: everything, of which sqrt(S) is read.

Letters: B batch, T new tokens, N query heads, K key and value heads, G = N / K,
S positions, A anchors, W anchors that are kept, H head size.
"""

import dataclasses
import math
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.systems import kept_whole
from joma.systems.mixers import anchors as anchors_lib
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer.weighing import one_query


@runtime_checkable
class Spanning(Protocol):
  """A system of this kind; see `superlinear.Superlinear`."""

  name: ClassVar[str]

  @property
  def anchors(self) -> anchors_lib.Anchors:
    """Where anchors and spans stand."""
    ...

  def search(
      self, params: hooks.Params, call: hooks.Call
  ) -> Float[Array, "B T K H"]:
    """Search queries."""
    ...

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      search: Float[Array, "B T K H"],
      call: hooks.Call,
  ) -> Float[Array, "B T N H"]:
    """Attends to whole texts."""
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SuperlinearCache(kept_whole.KeptWhole[Spanning]):
  """A `hooks.KVCache` of one layer."""

  def read(
      self, new: kept_whole.New
  ) -> tuple[Float[Array, "B T N H"], "SuperlinearCache"]:
    """Spans round the anchors that the search query likes best."""
    search = self.system.search(new.call.params[self.system.name], new.call)
    if new.is_step:
      at = new.positions[:, 0]
      return self._read(new.query, search[:, 0], at, new.options), self
    text = (new.query, new.key, new.value)
    return self.system.attend(*text, search, new.call), self

  def _read(
      self,
      query: Float[Array, "B 1 N H"],
      search: Float[Array, "B K H"],
      position: Int[Array, "B"],
      options: hooks.AttentionOptions,
  ) -> Float[Array, "B 1 N H"]:
    anchors, key = self.system.anchors, self.kept.key
    capacity = key.shape[2]
    anchor = anchors.places(position, anchors.num(capacity))
    places = jnp.broadcast_to(
        anchor[:, None], (*key.shape[:2], anchor.shape[-1])
    )
    found = kept_whole.blocks(key, jnp.maximum(places, 0), 1)[:, :, :, 0]
    scores = jnp.einsum(
        "BKH,BKAH->BKA",
        search.astype(jnp.float32),
        found.astype(jnp.float32),
    )
    width = min(anchors.k, places.shape[-1])
    scores, anchor = anchors_lib.best(scores, places, width)
    gate = anchors_lib.gates(scores, anchor >= 0)
    position = jnp.broadcast_to(position[:, None], key.shape[:2])
    first = position + 1 - anchors.window
    near = (first, position + 1, min(anchors.window, capacity))
    # Where there is no anchor yet the window is everything.
    rest = 1 - gate.sum(axis=-1)
    out = self._attend_to(query, [near], options, rest) if anchors.window else 0
    root = math.sqrt(capacity)
    reach = lambda factor: math.ceil(min(factor * root, capacity))
    size = min(reach(anchors.behind) + reach(anchors.ahead) + 1, capacity)
    for number in range(anchor.shape[-1]):
      span = anchors.span(position, anchor[..., number], capacity)
      ranges = [near] * bool(anchors.window) + [(*span, size)]
      out += self._attend_to(query, ranges, options, gate[..., number])
    assert not isinstance(out, int)  # A window or an anchor there is.
    return out.astype(query.dtype)

  def _attend_to(
      self,
      query: Float[Array, "B 1 N H"],
      ranges: list[tuple[Int[Array, "B K"], Int[Array, "B K"], int]],
      options: hooks.AttentionOptions,
      share: Float[Array, "B K"],
  ) -> Float[Array, "B 1 N H"]:
    """Attention to ranges of keys, of static sizes, by its share."""
    parts = []
    for start, stop, size in ranges:
      # A slice that would reach past the end begins earlier.
      at = jnp.clip(start, 0, self.kept.key.shape[2] - size)[..., None]
      place = at + jnp.arange(size)[None, None]
      is_seen = (place >= start[..., None]) & (place < stop[..., None])
      cut = lambda x, at=at, size=size: kept_whole.slices(x, at, size)[:, :, 0]
      parts.append((cut(self.kept.key), cut(self.kept.value), is_seen))
    key, value, is_seen = (
        jnp.concatenate(arrays, axis=2) for arrays in zip(*parts, strict=True)
    )
    # A row of nothing has a share of 0; it must be a number all the same.
    is_seen |= ~is_seen.any(axis=-1, keepdims=True)
    out, _ = one_query.attend(query, key, value, is_seen, options)
    share = jnp.repeat(share, query.shape[2] // share.shape[1], axis=1)
    return share[:, None, :, None] * out.astype(jnp.float32)


def init(
    system: Spanning,
    config: configs.TransformerConfig,
    layer: int,
    batch_size: int,
    capacity: int,
    dtype: jax.typing.DTypeLike,
) -> SuperlinearCache:
  """Returns an empty cache of one layer.

  Raises:
    UserError: The model's rotary frequencies change with the text, and keys are
      kept rotated.
  """
  kept = full_cache.of_rotated(
      system.name, config, layer, batch_size, capacity, dtype
  )
  return SuperlinearCache(system, kept)
