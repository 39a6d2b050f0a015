"""The gated delta rule position by position: the contract of the op.

  kept   = decay_t * state_{t-1}            by head, or by key channel
  state_t = kept + beta_t key_t (value_t - kept^T key_t)^T
  out_t   = scale state_t^T query_t

(Gated DeltaNet, https://arxiv.org/abs/2412.06464; a decay per key channel is
Kimi Delta Attention, https://arxiv.org/abs/2510.26692.)
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.gated_delta_rule import operands as operands_lib


def attend(
    operands: operands_lib.Operands, scale: float
) -> operands_lib.Results:
  """Computes the op; differentiable by jax itself."""
  visit = lambda state, arrays: step(state, *arrays, scale=scale)[::-1]
  in_turn = tuple(jnp.moveaxis(x, 1, 0) for x in operands[:-1])
  state, out = jax.lax.scan(visit, operands.state, in_turn)
  return jnp.moveaxis(out, 0, 1), state


def step(
    state: Float[Array, "B N H J"],
    query: Float[Array, "B K H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B N J"],
    log_decay: Float[Array, "B N D"],
    beta: Float[Array, "B N"],
    scale: float,
) -> tuple[Float[Array, "B N J"], Float[Array, "B N H J"]]:
  """One position: out and the next state. Reads and writes the state once."""
  num_groups = value.shape[1] // key.shape[1]
  wide = functools.partial(jnp.asarray, dtype=state.dtype)
  rows, columns = (
      jnp.repeat(wide(x), num_groups, axis=1)[..., None] for x in (query, key)
  )
  decay = jnp.exp(log_decay)[..., None]
  # Sums of products, not matrix products: they join passes over the state. Out
  # is read from the next one, so that a donated state is written in place.
  recalled = ((decay * columns) * state).sum(axis=-2)
  added = beta[..., None] * (wide(value) - recalled)
  state = decay * state + columns * added[..., None, :]
  out = scale * (rows * state).sum(axis=-2)
  return out.astype(query.dtype), state
