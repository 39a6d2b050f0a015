"""Causal linear attention with a decay per head, and its decode step.

Letters: B batch, T positions, N query heads, K key and value heads, H head
size. Lightning Attention-2 (https://arxiv.org/abs/2401.04658): what softmax
attention costs a query grows with T, this does not.

Paper's settings: those of the system `lightning`.
"""

import importlib
import types

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from kernels_pallas import arguments
from kernels_pallas import implementations
from kernels_pallas import masks
from kernels_pallas.linear_attention import differentiable
from kernels_pallas.linear_attention import documents
from kernels_pallas.linear_attention import output
from kernels_pallas.linear_attention import reference
from kernels_pallas.linear_attention import sweep
from kernels_pallas.linear_attention import xla
from kernels_pallas.transformations import exported


def linear_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    decay: Float[Array, "N"] | None = None,
    scale: float | None = None,
    initial_state: Float[Array, "B N H H"] | None = None,
    segment_starts: Bool[Array, "B T"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    return_state: bool = False,
    implementation: implementations.Implementation | None = None,
    config: implementations.Config = None,
) -> output.LinearAttentionOutput:
  """Attends with scale sum_{s <= t} decay^(t - s) (query_t . key_s) value_s.

  Differentiable by all arrays, through `out` and `state`.

  Args:
    query: Any float type; sums are float32 (float64 for float64).
    key: K divides N; head n reads key head n // (N / K).
    value: As key.
    decay: What a step leaves of the state, in (0, 1]; None is 1, which forgets
      nothing. Values that are traced are not checked.
    scale: None is H ** -0.5.
    initial_state: What came before, of an earlier call; None is zeros.
    segment_starts: Where a document begins, which sees nothing of what is
      before: neither other documents nor the initial state. None is nowhere.
      Only XLA can follow them.
    lengths: Positions of each sequence that count; those after it leave the
      state as it is, and their `out` is 0. None is all.
    return_state: Whether to return the state after the last position.
    implementation: None is the best of the platform; a named one raises where
      it cannot run.
    config: Sizes of chunks, the `Config` of the implementation; None lets it
      choose.

  Raises:
    ValueError: If shapes, types or options do not fit together, or the
      implementation is unknown or not for this platform.
  """
  arguments.check_arrays(query, key, value)
  if query.shape[1] != key.shape[1]:
    raise ValueError(
        f"query has {query.shape[1]} positions and key {key.shape[1]}; linear"
        " attention needs as many of both, and `step` for one after others"
    )
  batch, _, num_heads, head_dim = query.shape
  scale = _check_scale(scale, head_dim)
  _check_decay(decay, num_heads)
  _check_state("initial_state", initial_state, (batch, num_heads, head_dim))
  arguments.check_positions(value, segment_starts, lengths)
  if segment_starts is not None:
    if implementation in ("pallas_tpu", "pallas_gpu"):
      raise ValueError(
          f"implementation={implementation!r} cannot follow segment_starts; use"
          " 'xla', 'reference' or None"
      )
    implementation = implementation or "xla"
  workload = exported.abstract(query)
  choose = lambda named=None: implementations.choose_for(
      named, _module, workload
  )
  chosen, query = exported.chosen(
      "linear attention", implementation, choose, ("BTNH", query)
  )
  arguments.check_config(config, chosen, _module(chosen))
  dtype = sweep.sum_type(query.dtype)
  shape = (batch, num_heads, head_dim, head_dim)
  state = jnp.zeros(shape, dtype) if initial_state is None else initial_state
  # In the type of the sums: powers of a rounded decay would drift with T.
  rates, state = _decay(decay, num_heads, dtype), jnp.asarray(state, dtype)
  log_decay = sweep.log_of(rates)
  operands = sweep.Operands(query, key, value, log_decay, state)

  def attend(
      query: Array, key: Array, value: Array, state: Array
  ) -> output.LinearAttentionOutput:
    # The reference is differentiated by jax itself, and there are no chunks of
    # nothing.
    if chosen == "reference" or 0 in query.shape:
      own = sweep.Operands(query, key, value, log_decay, state)
      return reference.attend(own, scale)
    arrays = (query, key, value, rates, state)
    return differentiable.attend(_module(chosen), arrays, scale, config)

  if segment_starts is not None:
    sizes = config or xla.Config()
    assert isinstance(sizes, xla.Config)  # Checked above.
    chunk = query.shape[1] if chosen == "reference" else sizes.chunk
    chunk = max(chunk, 1)
    result = documents.packed(operands, segment_starts, lengths, scale, chunk)
  elif lengths is not None:
    result = documents.padded(attend, operands, lengths, scale)
  else:
    result = attend(query, key, value, state)
  return result if return_state else result._replace(state=None)


def step(
    state: Float[Array, "B N H H"],
    query: Float[Array, "B N H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B K H"],
    decay: Float[Array, "N"] | None = None,
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N H H"]]:
  """Decodes one position: out, and the state to give to the next step.

  One pass over the state by XLA, on any platform; donate the state, and it is
  updated in place. Differentiable.

  Args:
    state: Of `linear_attention(..., return_state=True)` or of the last step.
    query: Any float type, of one position.
    key: K divides N.
    value: As key.
    decay: As in `linear_attention`.
    scale: None is H ** -0.5.

  Raises:
    ValueError: If shapes or types do not fit together.
  """
  for name, array in (("query", query), ("key", key), ("value", value)):
    if np.ndim(array) != 3:
      raise ValueError(
          f"{name} has shape {np.shape(array)}; in a step it must have 3 axes:"
          " batch, head, head_dim"
      )
  arguments.check_arrays(*(x[:, None] for x in (query, key, value)))
  batch, num_heads, head_dim = query.shape
  scale = _check_scale(scale, head_dim)
  _check_decay(decay, num_heads)
  _check_state("state", state, (batch, num_heads, head_dim))
  dtype = sweep.sum_type(query.dtype)
  rates = _decay(decay, num_heads, dtype)
  state = jnp.asarray(state, dtype)
  return reference.step(state, query, key, value, rates, scale)


def _module(implementation: implementations.Implementation) -> types.ModuleType:
  """Imports on demand: GPU kernels need a newer jax than the others."""
  return importlib.import_module(f"{__package__}.{implementation}")


def _decay(
    decay: jax.Array | None, num_heads: int, dtype: jnp.dtype
) -> jax.Array:
  return jnp.ones(num_heads, dtype) if decay is None else decay.astype(dtype)


def _check_scale(scale: float | None, head_dim: int) -> float:
  arguments.check_number("scale", scale)
  return head_dim**-0.5 if scale is None else float(scale)


def _check_decay(decay: masks.AnyArray | None, num_heads: int) -> None:
  if decay is None:
    return
  arguments.check_float_array("decay", decay)
  if decay.shape != (num_heads,):
    raise ValueError(
        f"decay has shape {decay.shape}; it must be one number for each of the"
        f" {num_heads} query heads"
    )
  if isinstance(decay, jax.core.Tracer):
    return
  wide = np.asarray(decay, np.float64)
  wrong = wide[~((wide > 0) & (wide <= 1))]
  if wrong.size:
    raise ValueError(
        f"decay has a value of {wrong[0]:g}; each must be above 0 and at most 1"
    )


def _check_state(
    name: str, state: masks.AnyArray | None, sizes: tuple[int, int, int]
) -> None:
  if state is None:
    return
  arguments.check_float_array(name, state)
  shape = (*sizes, sizes[-1])
  if state.shape != shape:
    raise ValueError(
        f"{name} has shape {state.shape}; it must be batch, query heads,"
        f" head_dim, head_dim = {shape}"
    )
