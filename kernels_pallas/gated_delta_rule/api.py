"""The gated delta rule, and its decode step.

  kept    = decay_t * state_{t-1}
  state_t = kept + beta_t key_t (value_t - kept^T key_t)^T
  out_t   = scale state_t^T query_t

Gated DeltaNet (https://arxiv.org/abs/2412.06464) has one decay a head, Kimi
Delta Attention (https://arxiv.org/abs/2510.26692) one a key channel. The state
forgets by the decay and, unlike that of linear attention, replaces what it
holds at a key: with keys of unit length, beta 1 and no decay it recalls as many
orthogonal keys as it has channels, exactly.

Paper's settings: those of the systems `gdn` and `kda`.
"""

import importlib
import types

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import arguments
from kernels_pallas import implementations
from kernels_pallas.gated_delta_rule import checks
from kernels_pallas.gated_delta_rule import differentiable
from kernels_pallas.gated_delta_rule import operands as operands_lib
from kernels_pallas.gated_delta_rule import output
from kernels_pallas.gated_delta_rule import reference
from kernels_pallas.transformations import exported


def gated_delta_rule(
    query: Float[Array, "B T K H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T N J"],
    log_decay: Float[Array, "B T N *D"],
    beta: Float[Array, "B T N"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B N H J"] | None = None,
    segment_starts: Bool[Array, "B T"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    implementation: implementations.Implementation | None = None,
    config: implementations.Config = None,
) -> output.GatedDeltaRuleOutput:
  """Runs the rule over a sequence: out, and the state after it.

  Differentiable by all float arrays, through `out` and `state`.

  Args:
    query: Any float type; sums and the state are float32 (float64 for
      float64). K divides N; value head n has query and key of head n // (N /
      K).
    key: Of unit length, or beta |key|^2 at most 2, where the rule is stable;
      it is taken as it is.
    value: J may differ from H.
    log_decay: Natural logarithm of what a position leaves of the state before
      it, at most 0; -inf leaves nothing. [B, T, N] of a head, or
      [B, T, N, H] of each of its key channels. Traced values are not checked.
    beta: How much of what is missing at its key a position adds; 0 adds
      nothing.
    scale: None is H ** -0.5.
    initial_state: What came before, of an earlier call; None is zeros.
    segment_starts: Where a document begins, which sees nothing of what is
      before: neither other documents nor the initial state. None is nowhere.
    lengths: Positions of each sequence that count; those after it leave the
      state as it is, and their `out` is 0. None is all.
    implementation: None is the best of the platform; a named one raises where
      it cannot run.
    config: Sizes of chunks, the `Config` of the implementation; None lets it
      choose.

  Returns:
    `out` [B, T, N, J] and `state` [B, N, H, J].

  Raises:
    ValueError: If shapes, types or options do not fit together, or the
      implementation is unknown or not for this platform.
  """
  checks.check_arrays(query, key, value, log_decay, beta)
  arguments.check_positions(value, segment_starts, lengths)
  batch, _, num_heads, value_size = value.shape
  sizes = (batch, num_heads, query.shape[3], value_size)
  checks.check_state("initial_state", initial_state, sizes)
  scale = checks.scale_of(scale, query)
  workload = exported.abstract(query)
  choose = lambda named=None: implementations.choose_for(
      named, _module, workload
  )
  axes, op = (("BTKH", query), ("BTNJ", value)), "the gated delta rule"
  chosen, query = exported.chosen(op, implementation, choose, *axes)
  arguments.check_config(config, chosen, _module(chosen))
  dtype = operands_lib.sum_type(query.dtype)
  state = jnp.zeros(sizes, dtype) if initial_state is None else initial_state
  operands = operands_lib.Operands(
      query,
      key,
      value,
      checks.by_channel(log_decay.astype(dtype), value),
      beta.astype(dtype),
      jnp.asarray(state, dtype),
  )
  if segment_starts is not None:
    operands = operands_lib.reset(operands, segment_starts)
  if lengths is not None:
    operands = operands_lib.blank(operands, lengths)
  # The reference is differentiated by jax itself, and there are no chunks of
  # nothing.
  if chosen == "reference" or 0 in query.shape + value.shape:
    return output.GatedDeltaRuleOutput(*reference.attend(operands, scale))
  operands = operands_lib.bounded(operands)
  result = differentiable.attend(_module(chosen), operands, scale, config)
  return output.GatedDeltaRuleOutput(*result)


def step(
    state: Float[Array, "B N H J"],
    query: Float[Array, "B K H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B N J"],
    log_decay: Float[Array, "B N *D"],
    beta: Float[Array, "B N"],
    *,
    scale: float | None = None,
) -> output.GatedDeltaRuleOutput:
  """Decodes one position: out, and the state to give to the next step.

  One pass over the state by XLA, on any platform; donate the state, and it is
  updated in place. Differentiable.

  Args:
    state: Of `gated_delta_rule` or of the last step.
    query: As there, of one position; so are the others.
    key: K divides N.
    value: J may differ from H.
    log_decay: [B, N], or [B, N, H] by key channel.
    beta: A number a head.
    scale: None is H ** -0.5.

  Returns:
    `out` [B, N, J] and `state` [B, N, H, J].

  Raises:
    ValueError: If shapes or types do not fit together.
  """
  checks.check_position(
      {"query": query, "key": key, "value": value},
      {"log_decay": log_decay, "beta": beta},
  )
  one = (x[:, None] for x in (query, key, value, log_decay, beta))
  query, key, value, log_decay, beta = one
  checks.check_arrays(query, key, value, log_decay, beta)
  batch, _, num_heads, value_size = value.shape
  sizes = (batch, num_heads, query.shape[3], value_size)
  checks.check_state("state", state, sizes)
  scale = checks.scale_of(scale, query)
  dtype = operands_lib.sum_type(query.dtype)
  out, state = reference.step(
      jnp.asarray(state, dtype),
      query[:, 0],
      key[:, 0],
      value[:, 0],
      checks.by_channel(log_decay.astype(dtype), value)[:, 0],
      beta[:, 0].astype(dtype),
      scale,
  )
  return output.GatedDeltaRuleOutput(out, state)


def _module(implementation: implementations.Implementation) -> types.ModuleType:
  """Imports on demand: GPU kernels need a newer jax than the others."""
  return importlib.import_module(f"{__package__}.{implementation}")
