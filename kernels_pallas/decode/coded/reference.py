"""The op as its definition has it: everything decoded, one softmax.

Letters: B batch, N query heads, K key and value heads, M blocks, R tokens of a
block, H head size.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.decode.coded import codes


def attend(
    query: Float[Array, "B N H"],
    keys: codes.Blocks,
    values: codes.Blocks,
    newest_key: Float[Array, "B K R H"],
    newest_value: Float[Array, "B K R H"],
    positions: Int[Array, "B"],
    scale: float,
) -> Float[Array, "B N H"]:
  """Computes the op, see `api`."""
  batch, num_heads, head_dim = query.shape
  num_kv_heads, size = newest_key.shape[1:3]
  flat = lambda x: x.swapaxes(1, 2).reshape(batch, num_kv_heads, -1, head_dim)
  both = lambda blocks, over, newest: jnp.concatenate(
      [flat(codes.decode(blocks, over)), newest.astype(jnp.float32)], axis=2
  )
  key = both(keys, "tokens", newest_key)
  value = both(values, "channels", newest_value)
  num_coded = key.shape[2] - size
  at = jnp.arange(num_coded + size)[None]
  full = (positions // size * size)[:, None]
  # Tokens of the newest block follow those of the full ones.
  pos = jnp.where(at < num_coded, at, full + at - num_coded)
  is_coded = at < num_coded
  seen = jnp.where(is_coded, pos < full, pos <= positions[:, None])
  seen = seen & (positions >= 0)[:, None]
  groups = (batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
  logits = jnp.einsum(
      "BKGH,BKSH->BKGS",
      query.reshape(groups).astype(jnp.float32),
      key,
      precision="highest",
  )
  logits = jnp.where(seen[:, None, None], scale * logits, -jnp.inf)
  highest = jnp.max(logits, axis=-1, keepdims=True, initial=-1e30)
  weights = jnp.exp(logits - highest)  # Where nothing is seen all is 0.
  total = jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
  out = jnp.einsum(
      "BKGS,BKSH->BKGH", weights / total, value, precision="highest"
  )
  return out.reshape(query.shape).astype(query.dtype)
