"""The cache of NAtS-L: a state, kept chunks of keys, and the chunk that grows.

Shapes never change: kept chunks lie in slots, as many as the cache was made
with for each key head, and fill them in their order. A chunk for which no slot
is left is not dropped silently: what is read from then on is NaN, and
`overflow` says how many there were.

Letters: B batch, T new tokens, D width, N query heads, K key and value heads, H
head size, P slots, U tokens of a chunk, C chunks.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from joma.systems import newest_inputs
from joma.systems import of_system
from joma.systems.routers import nats_slots
from joma.systems.routers import nats_text
from joma.systems.routers import nats_ways
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer.weighing import one_query
from kernels_pallas.gated_delta_rule import api


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NatsCache(
    of_system.InPieces[nats_text.Routing],
    of_system.PromptFirst[nats_text.Routing],
):
  """A KVCache of one layer.

  Attributes:
    state: Before the chunk that grows, float32 [B, N, H, H].
    inner: After its newest token.
    faded: Sum of its logarithms of decays [B, N].
    total: Sum of the layer's inputs over it, float32 [B, D].
    length: Tokens of each text so far [B].
    inputs: The newest of queries, keys and values, by name, [B, w - 1, ., H].
    key: Of kept chunks, and behind them of the one that grows, [B, K, (P + 1)
      U, H].
    value: Likewise.
    num_kept: Slots that are filled [B, K].
    num_lost: Chunks that found none [B, K].
  """

  state: PyTree
  inner: PyTree
  faded: PyTree
  total: PyTree
  length: PyTree
  inputs: PyTree
  key: PyTree
  value: PyTree
  num_kept: PyTree
  num_lost: PyTree

  @property
  def num_slots(self) -> int:
    """P."""
    return self.key.shape[2] // self.system.chunk - 1

  def num_positions(self) -> int | None:
    """Those of a text whose chunks all stay; None where slots are bounded."""
    if self.system.slots:
      return None
    return self.num_slots * self.system.chunk

  def overflow(self) -> str | None:
    """How many chunks found no slot; None where all did."""
    lost = int(jnp.max(self.num_lost))
    if not lost:
      return None
    return (
        f"{self.system.name} has kept {self.num_slots} chunks of"
        f" {self.system.chunk} tokens, and {lost} more found no slot: give it"
        f" slots={self.num_slots + lost} or more, or 0 for as many as the text"
        " has."
    )

  def take(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "NatsCache"]:
    """Takes a first prompt, padded at its end, or one token a sequence."""
    call = options.call
    assert call is not None  # A layer gives it to the caches of its systems.
    is_token, arrays = positions >= 0, (query, key, value)
    lengths = is_token.sum(axis=1)
    both, inputs = newest_inputs.put_before(self.inputs, arrays, lengths)
    cache = dataclasses.replace(
        self, inputs=inputs, length=self.length + lengths
    )
    if query.shape[1] > 1:
      return cache._prompt(call, arrays, lengths)
    found = nats_text.vectors(
        self.system, call.params[self.system.name], call.x, both
    )
    return cache._step(call, found, is_token[:, 0])

  def _prompt(
      self,
      call: hooks.Call,
      arrays: tuple[Array, Array, Array],
      lengths: Int[Array, "B"],
  ) -> tuple[Float[Array, "B T N H"], "NatsCache"]:
    system, size = self.system, self.system.chunk
    text = nats_text.read(
        system, call.params[system.name], call, arrays, lengths
    )
    num_whole = lengths // size
    chunk = jnp.arange(text.is_kept.shape[1])[None]
    is_kept = text.is_kept & (chunk < num_whole[:, None])[..., None]
    has_room, place = nats_slots.places(
        is_kept, num_whole, self.num_slots, size
    )
    key, value = (
        nats_slots.put(
            kept, jnp.moveaxis(nats_slots.whole(x, size), 2, 1), place
        )
        for kept, x in (
            (self.key, text.vectors.soft_key),
            (self.value, text.vectors.value),
        )
    )
    at = jnp.arange(call.x.shape[1])[None]
    is_last = (at >= (num_whole * size)[:, None]) & (at < lengths[:, None])
    own = lambda x: jnp.einsum(
        "BTD,BT->BD", x.astype(jnp.float32), is_last.astype(jnp.float32)
    )
    cache = dataclasses.replace(
        self,
        state=text.state,
        inner=text.inner,
        faded=own(text.vectors.linear[3]),
        total=own(call.x),
        key=key,
        value=value,
        num_kept=(is_kept & has_room).sum(axis=1).astype(jnp.int32),
        num_lost=(is_kept & ~has_room).sum(axis=1).astype(jnp.int32),
    )
    return cache._told(text.out), cache

  def _step(
      self,
      call: hooks.Call,
      found: nats_ways.Vectors,
      is_token: Bool[Array, "B"],
  ) -> tuple[Float[Array, "B 1 N H"], "NatsCache"]:
    system, size, options = self.system, self.system.chunk, call.options
    params = call.params[system.name]
    of_rows = lambda x, like: x.reshape(-1, *(1,) * (like.ndim - 1))
    held = lambda new, old: jnp.where(of_rows(is_token, old), new, old)
    one = [x[:, 0] for x in found.linear]
    linear = api.step(self.inner, *one, scale=options.scale)
    within = jnp.maximum(self.length - 1, 0) % size
    own = self.num_slots * size
    place = jnp.where(is_token, own + within, self.key.shape[2])
    place = jnp.broadcast_to(place[:, None, None], (*self.num_kept.shape, 1))
    key, value = (
        nats_slots.put(kept, x.swapaxes(1, 2), place)
        for kept, x in ((self.key, found.soft_key), (self.value, found.value))
    )
    at = jnp.arange(key.shape[2])[None, None]
    is_seen = at < self.num_kept[..., None] * size
    is_seen |= (at >= own) & (at <= own + within[:, None, None])
    soft, _ = one_query.attend(found.soft_query, key, value, is_seen, options)
    out = system.finish(params, call.x, found.query, soft, linear.out[:, None])
    cache = dataclasses.replace(
        self,
        inner=held(linear.state, self.inner),
        faded=held(self.faded + one[3], self.faded),
        total=held(self.total + call.x[:, 0].astype(jnp.float32), self.total),
        key=key,
        value=value,
    )
    cache = cache._routed(params, is_token & (within == size - 1))
    return cache._told(out), cache

  def _routed(
      self, params: hooks.Params, is_whole: Bool[Array, "B"]
  ) -> "NatsCache":
    """Keeps or folds the chunk that grew, where it is complete."""
    size, own = self.system.chunk, self.num_slots * self.system.chunk
    mean = (self.total / size)[:, None]
    is_kept = self.system.routes(params, mean)[0][:, 0]
    goes = is_kept & is_whole[:, None]
    has_room = self.num_kept < self.num_slots
    to = jnp.where(goes & has_room, self.num_kept, self.num_slots + 1)
    place = to[..., None] * size + jnp.arange(size)[None, None]
    key, value = (
        nats_slots.put(kept, kept[:, :, own:], place)
        for kept in (self.key, self.value)
    )
    of_heads = jnp.repeat(
        is_kept, self.state.shape[1] // is_kept.shape[1], axis=1
    )[..., None, None]
    faded = jnp.exp(self.faded)[..., None, None] * self.state
    state = jnp.where(of_heads, faded, self.inner)
    where = lambda new, old: jnp.where(
        is_whole.reshape(-1, *(1,) * (old.ndim - 1)), new, old
    )
    return dataclasses.replace(
        self,
        state=where(state, self.state),
        inner=where(state, self.inner),
        faded=where(jnp.zeros_like(self.faded), self.faded),
        total=where(jnp.zeros_like(self.total), self.total),
        key=key,
        value=value,
        num_kept=self.num_kept + (goes & has_room),
        num_lost=self.num_lost + (goes & ~has_room),
    )

  def _told(self, out: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """What is read, or NaN where a chunk that was to be kept is not there."""
    is_lost = (self.num_lost > 0).any(axis=1)[:, None, None, None]
    return jnp.where(is_lost, jnp.nan, out)


def init(
    system: nats_text.Routing,
    config: configs.TransformerConfig,
    batch_size: int,
    capacity: int,
    dtype: jax.typing.DTypeLike,
) -> NatsCache:
  """Returns the empty cache of one layer.

  Args:
    system: The router.
    config: The model's.
    batch_size: B.
    capacity: Positions of the longest text.
    dtype: Of keys and values.
  """
  size, slots = config.head_dim, system.slots or -(-capacity // system.chunk)
  zeros = lambda *shape: jnp.zeros((batch_size, *shape))
  count = lambda *shape: jnp.zeros((batch_size, *shape), jnp.int32)
  inputs = newest_inputs.none(config, batch_size, system.width)
  # Each its own arrays, which a step may write in place.
  state = lambda: zeros(config.num_heads, size, size)
  length = (slots + 1) * system.chunk
  shape = (batch_size, config.num_kv_heads, length, size)
  return NatsCache(
      state=state(),
      inner=state(),
      faded=zeros(config.num_heads),
      total=zeros(config.embed_dim),
      length=count(),
      inputs=inputs,
      key=jnp.zeros(shape, dtype),
      value=jnp.zeros(shape, dtype),
      num_kept=count(config.num_kv_heads),
      num_lost=count(config.num_kv_heads),
      system=system,
  )
