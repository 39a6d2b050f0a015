"""Linear attention in plain jnp: the contract of the op.

  state_t = decay state_{t-1} + key_t value_t^T
  out_t   = scale query_t state_t
          = scale (sum_{s <= t} decay^(t - s) (query_t . key_s) value_s
                   + decay^(t + 1) query_t state_{-1})

`attend` is the second form, with the whole T x T array; `step` the first.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.linear_attention import output
from kernels_pallas.linear_attention import sweep as sweep_lib


def attend(
    operands: sweep_lib.Operands, scale: float
) -> output.LinearAttentionOutput:
  """Computes the op; differentiable by jax itself."""
  query, key, value, log_decay, state = operands
  dtype, length, out_dtype = state.dtype, query.shape[1], query.dtype
  num_groups = query.shape[2] // key.shape[2]
  query = query.astype(dtype)
  key, value = (
      jnp.repeat(x.astype(dtype), num_groups, axis=2) for x in (key, value)
  )
  position = jnp.arange(length)
  # decay^(t - s), where s is not after t.
  ago = position[:, None] - position[None]
  weights = jnp.exp(log_decay[:, None, None] * jnp.maximum(ago, 0)[None])
  weights = jnp.where(ago >= 0, weights, 0)
  attn = jnp.einsum("BTNH,BSNH->BNTS", query, key, precision="highest")
  attn = attn * weights[None]
  out = jnp.einsum("BNTS,BSNH->BTNH", attn, value, precision="highest")
  # What the first state has lost when position t reads it.
  since = jnp.exp(log_decay[None, :] * (position[:, None] + 1))
  out += since[None, :, :, None] * jnp.einsum(
      "BTNH,BNHJ->BTNJ", query, state, precision="highest"
  )
  # What is left of position s after the last one.
  until = jnp.exp(log_decay[None, :] * (length - 1 - position[:, None]))
  state = jnp.exp(log_decay * length)[None, :, None, None] * state
  state += jnp.einsum(
      "BTNH,BTNJ->BNHJ",
      until[None, :, :, None] * key,
      value,
      precision="highest",
  )
  return output.LinearAttentionOutput((scale * out).astype(out_dtype), state)


def step(
    state: Float[Array, "B N H H"],
    query: Float[Array, "B N H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B K H"],
    decay: Float[Array, "N"],
    scale: float,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N H H"]]:
  """One position: out and the next state. Reads and writes the state once."""
  num_groups = query.shape[1] // key.shape[1]
  key, value = (
      jnp.repeat(x.astype(state.dtype), num_groups, axis=1)
      for x in (key, value)
  )
  added = key[..., :, None] * value[..., None, :]
  state = decay[None, :, None, None] * state + added
  # Sums of products, not a matrix product: it joins the pass over the state.
  out = (query.astype(state.dtype)[..., :, None] * state).sum(axis=-2)
  return (scale * out).astype(query.dtype), state
