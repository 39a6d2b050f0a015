"""Linear attention that is differentiated by sweeps, see `sweep`."""

import functools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import implementations
from kernels_pallas.linear_attention import output
from kernels_pallas.linear_attention import sweep as sweep_lib
from kernels_pallas.linear_attention import xla
from kernels_pallas.transformations import derivatives
from kernels_pallas.transformations import manual_axes
from kernels_pallas.transformations import partitions

# Axes of query, key, value, decay and state, and of out and the last state.
_ARRAYS = ("b.n.", "b.k.", "b.k.", "n", "bn..")
_RESULTS = ("b.n.", "bn..")


class _Call(NamedTuple):
  """What is no array."""

  implementation: types.ModuleType | sweep_lib.Implementation
  scale: float
  config: implementations.Config


def attend(
    implementation: types.ModuleType | sweep_lib.Implementation,
    arrays: tuple[jax.Array, ...],
    scale: float,
    config: implementations.Config,
) -> output.LinearAttentionOutput:
  """Linear attention by sweeps of `implementation`, forward and backward.

  Args:
    implementation: What runs a sweep.
    arrays: Query [B, T, N, H], key and value [B, T, K, H], decay [N] and state
      [B, N, H, H].
    scale: Of out.
    config: Of the implementation.
  """
  call = jax.custom_vjp(_forward, nondiff_argnums=(0,))
  call.defvjp(_forward_and_kept, _backward)
  arrays = manual_axes.align(arrays)
  given = (_Call(implementation, scale, config), *arrays)
  result = derivatives.reverse_only("linear_attention", call, *given)
  return output.LinearAttentionOutput(*result)


def _forward(call: _Call, *arrays: jax.Array) -> sweep_lib.Swept:
  query, key, value, decay, state = arrays
  sweep = sweep_lib.Sweep(out_scale=call.scale, config=call.config)
  log_decay = sweep_lib.log_of(decay)
  operands = sweep_lib.Operands(query, key, value, log_decay, state)
  run = lambda operands: call.implementation.run(operands, sweep)
  labels = partitions.Labels.of(_ARRAYS, _RESULTS)
  return derivatives.run(
      "linear_attention", call.implementation, run, operands, labels=labels
  )


def _forward_and_kept(
    call: _Call, *arrays: jax.Array
) -> tuple[sweep_lib.Swept, tuple[jax.Array, ...]]:
  return _forward(call, *arrays), arrays


def _backward(
    call: _Call,
    arrays: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, ...]:
  back = functools.partial(_cotangents, call)
  # The gradient by a decay is left apart by sequence, which devices may share.
  results = (*_ARRAYS[:3], "bn", _ARRAYS[4])
  labels = partitions.Labels.of((_ARRAYS, _RESULTS), results)
  *found, d_decay, d_initial = derivatives.run(
      "linear_attention",
      call.implementation,
      back,
      arrays,
      cotangents,
      labels=labels,
  )
  return *found, d_decay.sum(axis=0), d_initial


def _cotangents(
    call: _Call,
    arrays: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, ...]:
  query, key, value, decay, state = arrays
  d_out, d_state = cotangents
  log_decay = sweep_lib.log_of(decay)
  is_grouped = key.shape[2] < query.shape[2]
  back = sweep_lib.Sweep(
      is_reversed=True,
      in_scale=call.scale,
      is_out_wide=is_grouped,
      config=call.config,
  )
  # Each gradient is a sweep in which the arrays have exchanged their parts.
  run = lambda sweep, *arrays: call.implementation.run(
      sweep_lib.Operands(*arrays), sweep
  )
  turned = lambda x: jnp.swapaxes(x, -1, -2)
  # States of a sweep are key by value channels: where the two exchange their
  # parts, the state is turned.
  ahead = sweep_lib.Sweep(out_scale=call.scale, config=call.config)
  d_query, _ = run(ahead, d_out, value, key, log_decay, turned(state))
  d_value, d_initial = run(back, key, query, d_out, log_decay, d_state)
  d_key, _ = run(back, value, d_out, query, log_decay, turned(d_state))
  # Sweeps give a gradient a query head; heads that share keys add theirs.
  d_key, d_value = (_sum_groups(x, key) for x in (d_key, d_value))
  d_decay = _d_decay(call.scale, arrays, cotangents)
  return d_query, d_key, d_value, d_decay, d_initial


def _sum_groups(x: jax.Array, like: jax.Array) -> jax.Array:
  """Adds up the query heads that share a key head."""
  batch, length, num_kv_heads, head_dim = like.shape
  grouped = x.reshape(batch, length, num_kv_heads, -1, head_dim)
  return grouped.sum(axis=3).astype(like.dtype)


def _d_decay(
    scale: float,
    arrays: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, jax.Array],
) -> jax.Array:
  """Of each sequence and head: how results move with decay, times cotangents.

  One more sweep, by XLA, which drops it where nobody asks for this gradient.
  """
  query, key, value, decay, state = arrays
  sweep = sweep_lib.Sweep(out_scale=scale, is_out_wide=True)

  def results(decay: jax.Array) -> sweep_lib.Swept:
    log_decay = sweep_lib.log_of(decay)
    return xla.run(
        sweep_lib.Operands(query, key, value, log_decay, state), sweep
    )

  _, moved = jax.jvp(results, (decay,), (jnp.ones_like(decay),))
  d_out, d_state = (x.astype(decay.dtype) for x in cotangents)
  by_out = jnp.einsum("BTNH,BTNH->BN", moved[0], d_out, precision="highest")
  by_state = jnp.einsum("BNHJ,BNHJ->BN", moved[1], d_state, precision="highest")
  return by_out + by_state
