"""One pass over a sequence, and how the backward is made of three of them.

A sweep visits positions in order, with a state [H, H] for each head:

  forward   state = decay state + in_scale key_t value_t^T
            out_t = out_scale query_t state
  reversed  state = state + in_scale key_t value_t^T
            out_t = out_scale query_t state,    state = decay state

from the last position to the first if reversed. With D_t the cotangent of the
state after position t, D_t = scale query_t d_out_t^T + decay D_{t+1}, and

  d_query_t = scale state_t d_out_t    a forward sweep over (d_out, value, key)
  d_value_t = D_t^T key_t              a reversed one over (key, query, d_out)
  d_key_t   = D_t value_t              a reversed one over (value, d_out, query)

so that an implementation is one function, `run`, and states are never stored.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.linear_attention import output


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
  """What is known of a sweep while it is traced.

  Attributes:
    is_reversed: From the last position to the first.
    in_scale: Factor of what is added to the state.
    out_scale: Factor of what is read from it.
    is_out_wide: Whether `out` stays in the type of the sums.
    config: Chunks of the implementation, None for its own choice.
  """

  is_reversed: bool = False
  in_scale: float = 1.0
  out_scale: float = 1.0
  is_out_wide: bool = False
  config: Any = None


class Implementation(Protocol):
  """A module with `run`."""

  def run(self, query, key, value, log_decay, state, sweep):
    """Returns out [B, T, N, H] and the state [B, N, H, H] at the end.

    Args:
      query: [B, T, N or a divisor of N, H].
      key: The same.
      value: As key.
      log_decay: [N], at most 0.
      state: [B, N, H, H] in the type of the sums.
      sweep: See `Sweep`.
    """
    ...


def sum_type(dtype: jax.typing.DTypeLike) -> Any:
  """What is summed in: float32, or float64 for float64."""
  return jnp.promote_types(dtype, jnp.float32)


def log_of(decay: Float[Array, "N"]) -> Float[Array, "N"]:
  """The logarithm; of what a CPU would flush to 0, of the least number."""
  return jnp.log(jnp.maximum(decay, jnp.finfo(decay.dtype).tiny))


def attend(
    implementation: Any,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    decay: Float[Array, "N"],
    state: Float[Array, "B N H H"],
    scale: float,
    config: Any,
) -> output.LinearAttentionOutput:
  """Linear attention by sweeps of `implementation`, forward and backward."""
  call = jax.custom_vjp(_forward, nondiff_argnums=(0, 1, 2))
  call.defvjp(_forward_and_kept, _backward)
  result = call(implementation, scale, config, query, key, value, decay, state)
  return output.LinearAttentionOutput(*result)


def _forward(implementation, scale, config, query, key, value, decay, state):
  sweep = Sweep(out_scale=scale, config=config)
  return implementation.run(query, key, value, log_of(decay), state, sweep)


def _forward_and_kept(implementation, scale, config, *arrays):
  return _forward(implementation, scale, config, *arrays), arrays


def _backward(implementation, scale, config, arrays, cotangents):
  query, key, value, decay, state = arrays
  d_out, d_state = cotangents
  log_decay = log_of(decay)
  is_grouped = key.shape[2] < query.shape[2]
  back = Sweep(
      is_reversed=True,
      in_scale=scale,
      is_out_wide=is_grouped,
      config=config,
  )
  d_query, _ = implementation.run(
      d_out,
      value,
      key,
      log_decay,
      jnp.swapaxes(state, -1, -2),
      Sweep(out_scale=scale, config=config),
  )
  d_value, d_initial = implementation.run(
      key, query, d_out, log_decay, d_state, back
  )
  d_key, _ = implementation.run(
      value, d_out, query, log_decay, jnp.swapaxes(d_state, -1, -2), back
  )
  d_key, d_value = (_sum_groups(x, key) for x in (d_key, d_value))
  return d_query, d_key, d_value, _d_decay(scale, arrays, cotangents), d_initial


def _sum_groups(x: Any, like: Any) -> Any:
  """Adds up the query heads that share a key head."""
  batch, length, num_kv_heads, head_dim = like.shape
  grouped = x.reshape(batch, length, num_kv_heads, -1, head_dim)
  return grouped.sum(axis=3).astype(like.dtype)


def _d_decay(scale: float, arrays: Any, cotangents: Any) -> Any:
  """Of each head: how its results move with its decay, times the cotangents.

  One more sweep, by XLA, which drops it where nobody asks for this gradient.
  """
  from kernels_pallas.linear_attention import xla

  query, key, value, decay, state = arrays
  sweep = Sweep(out_scale=scale, is_out_wide=True)

  def results(decay):
    return xla.run(query, key, value, log_of(decay), state, sweep)

  _, moved = jax.jvp(results, (decay,), (jnp.ones_like(decay),))
  d_out, d_state = (x.astype(decay.dtype) for x in cotangents)
  by_out = jnp.einsum("BTNH,BTNH->N", moved[0], d_out, precision="highest")
  by_state = jnp.einsum("BNHJ,BNHJ->N", moved[1], d_state, precision="highest")
  return by_out + by_state
