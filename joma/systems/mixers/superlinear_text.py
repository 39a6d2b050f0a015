"""Superlinear attention of whole texts, by the kernels.

Letters: B batch, T tokens, N query heads, K key and value heads, M = N + K, A
anchors, W anchors that are kept, H head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.systems.mixers import anchors as anchors_lib
from joma.transformer import hooks
from kernels_pallas import masks
from kernels_pallas import output
from kernels_pallas.attention import api

# Queries that are searched for at a time.
_SIZE = 128


def attend(
    anchors: anchors_lib.Anchors,
    both: Float[Array, "B T M H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    mask: masks.Mask,
    options: hooks.AttentionOptions,
) -> Float[Array, "B T N H"]:
  """Attends causally, key heads side by side with sequences.

  Args:
    anchors: Where anchors and spans stand.
    both: Query heads of each key head, and then its search query; rotated.
    key: Rotated.
    value: Of the keys.
    mask: Known to be causal.
    options: Scale, soft cap and implementation.
  """
  del mask  # Causal: known to be so.
  batch, length, num_kv_heads, head_dim = key.shape
  both = both.reshape(batch, length, num_kv_heads, -1, head_dim)
  fold = lambda x: x.swapaxes(1, 2).reshape(
      batch * num_kv_heads, length, -1, head_dim
  )
  folded, key, value = fold(both), fold(key), fold(value)
  query, search = folded[:, :, :-1], folded[:, :, -1]
  anchor = _best(anchors, search, key[:, :, 0])
  position = jnp.broadcast_to(jnp.arange(length)[None], key.shape[:2])
  near = lambda where: api.attention(
      query,
      key,
      value,
      where=where,
      scale=options.scale,
      logits_soft_cap=options.logits_soft_cap,
      implementation=options.implementation,
      return_lse=True,
  )
  window = masks.sliding_window(length, length, window=max(anchors.window, 1))
  always = [near(window)] if anchors.window else []
  rows = jnp.arange(len(key))[:, None, None]
  scores = jnp.einsum(
      "BTH,BTWH->BTW",
      search.astype(jnp.float32),
      key[rows, jnp.maximum(anchor, 0), 0].astype(jnp.float32),
  )
  gate = anchors_lib.gates(scores, anchor >= 0)
  # Where there is no anchor yet the window is everything.
  out = jnp.zeros(query.shape)
  if always:
    rest = 1 - gate.sum(axis=-1)
    out = rest[..., None, None] * always[0].out.astype(jnp.float32)
  for number in range(anchor.shape[-1]):
    start, stop = anchors.span(position, anchor[..., number], length)
    part = near(masks.Mask(start[:, None], stop[:, None]))
    merged = output.merge(*always, part).out.astype(jnp.float32)
    out += gate[..., number, None, None] * merged
  out = out.astype(query.dtype).reshape(
      batch, num_kv_heads, length, -1, head_dim
  )
  return out.swapaxes(1, 2).reshape(batch, length, -1, head_dim)


def _best(
    anchors: anchors_lib.Anchors,
    search: Float[Array, "B T H"],
    key: Float[Array, "B T H"],
) -> Int[Array, "B T W"]:
  """The best anchors of every query, -1 where there are fewer."""
  batch, length, head_dim = search.shape
  num_anchors = anchors.num(length)
  width = min(anchors.k, num_anchors)
  if not width:
    return jnp.zeros((batch, length, 0), jnp.int32)
  search, key = map(jax.lax.stop_gradient, (search, key))
  fill = -length % min(_SIZE, length)
  parts = jnp.pad(search, ((0, 0), (0, fill), (0, 0)))
  parts = parts.reshape(batch, -1, min(_SIZE, length), head_dim)
  position = jnp.arange(length + fill).reshape(parts.shape[1:3])

  def find(part: tuple[Array, Array]) -> Array:
    query, position = part
    anchor = anchors.places(position, num_anchors)
    found = key[:, jnp.maximum(anchor, 0)]  # [B, t, A, H]
    scores = jnp.einsum("BTH,BTAH->BTA", query, found)
    anchor = jnp.broadcast_to(anchor[None], scores.shape)
    return anchors_lib.best(scores, anchor, width)[1]

  anchor = jax.lax.map(find, (parts.swapaxes(0, 1), position))
  return anchor.swapaxes(0, 1).reshape(batch, -1, width)[:, :length]
