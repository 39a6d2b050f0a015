"""Times a decode step that evicts beside two with a full cache, by XLA.

A part of `launch.bench.kernels` for --target=cpu: one layer's attention in
float32, all caches donated from step to step, all their slots in use. A full
cache is read by our own attention, or by jax's, which is the peer.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from joma.transformer import full_cache
from joma.transformer import hooks
from kernels_pallas.decode import api
from kernels_pallas.decode import shapes
from kernels_pallas.decode import slots as slots_lib
from launch.bench import harness

_STEPS = 16


def decode_row(
    num_slots: int = 1024,
    num_keys: int = 8192,
    *,
    shape: shapes.Shape | None = None,
    num_times: int = 10,
) -> harness.Row:
  """Times `num_slots` slots beside full caches of `num_keys`.

  Args:
    num_slots: C of ours.
    num_keys: Of the full cache.
    shape: Heads; its capacity does not count. None is 32 query and 8 key heads
      of 128, one sequence.
    num_times: Turns of each, of `_STEPS` steps.
  """
  shape = shape or shapes.Shape(num_heads=32, num_kv_heads=8, capacity=0)
  vectors = tuple(
      jax.random.normal(jax.random.key(i), x.shape)
      for i, x in enumerate(shape.arrays("float32")[:3])
  )
  steps = {"ours": _step, "full": _full_step, "peer": _peer_step}
  key, value = _rows(shape, num_keys)
  caches = {
      "ours": _slots(shape, num_slots),
      "full": full_cache.FullCache(key, value),
      "peer": (key.swapaxes(1, 2), value.swapaxes(1, 2)),
  }
  positions = jnp.full(shape.batch, num_keys - 1, jnp.int32)

  def turn(name: str) -> None:
    # Steps of one sequence follow each other, and need not wait for a host.
    for _ in range(_STEPS):
      _, caches[name] = steps[name](caches[name], *vectors, positions)
    jax.block_until_ready(caches[name])

  turns = {name: functools.partial(turn, name) for name in steps}
  seconds = harness.take_turns(
      turns, num_times, num_warm_ups=2, num_steps=_STEPS
  )
  row: harness.Row = {"what": "decode step", "slots": num_slots}
  row |= {"keys": num_keys, "batch": shape.batch}
  for name, found in seconds.items():
    row |= harness.quartiles_ms(found, f"{name}_")
  row["of_full"] = row["full_ms"] / row["ours_ms"]
  row["of_peer"] = row["peer_ms"] / row["ours_ms"]
  return row


def _evict(
    cache: slots_lib.Slots,
    query: Array,
    key: Array,
    value: Array,
    positions: Array,
) -> tuple[PyTree, PyTree]:
  out, cache, _ = api.decode_step(
      query,
      key,
      value,
      cache,
      positions,
      num_sinks=4,
      num_recent=cache.capacity // 2,
      implementation="xla",
  )
  return out, cache


_step = jax.jit(_evict, donate_argnums=0)


def _attend(
    cache: full_cache.FullCache,
    query: Array,
    key: Array,
    value: Array,
    positions: Array,
) -> tuple[PyTree, PyTree]:
  options = hooks.AttentionOptions(scale=query.shape[-1] ** -0.5)
  query, key, value = (x[:, None] for x in (query, key, value))
  rotate = lambda x, _: x
  return cache.attend(query, key, value, positions[:, None], rotate, options)


_full_step = jax.jit(_attend, donate_argnums=0)


def _attend_by_jax(
    cache: tuple[Array, ...],
    query: Array,
    key: Array,
    value: Array,
    positions: Array,
) -> tuple[PyTree, PyTree]:
  """Keys in the order [B, S, K, H] that jax's attention wants."""
  rows = jnp.arange(len(positions))
  cache = tuple(
      kept.at[rows, positions].set(new)
      for kept, new in zip(cache, (key, value), strict=True)
  )
  out = jax.nn.dot_product_attention(
      query[:, None], *cache, key_value_seq_lengths=positions + 1
  )
  return out, cache


_peer_step = jax.jit(_attend_by_jax, donate_argnums=0)


def _slots(shape: shapes.Shape, num_slots: int) -> slots_lib.Slots:
  """Slots that are all taken, with random scores."""
  lead = (shape.batch, shape.num_kv_heads, num_slots)
  key, value = _rows(shape, num_slots)
  return slots_lib.Slots(
      key=key,
      value=value,
      score=jax.random.uniform(jax.random.key(2), lead),
      pos=jnp.broadcast_to(jnp.arange(num_slots, dtype=jnp.int32), lead) + 0,
  )


def _rows(shape: shapes.Shape, num: int) -> list[jax.Array]:
  dims = (shape.batch, shape.num_kv_heads, num, shape.head_dim)
  return [jax.random.normal(jax.random.key(i), dims) for i in (3, 4)]
