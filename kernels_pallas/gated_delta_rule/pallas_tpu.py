"""The gated delta rule on a TPU: a kernel forward, and two backward.

A step of the grid is a chunk of a few heads, whose states stay in VMEM from
chunk to chunk; of several heads, since what one waits for in its triangular
system the other computes. The algebra is that of `algebra.chunk`, whose system
is inverted by products. The backward makes the states of the chunks' starts
again, and visits the chunks from the last to the first. States and sums are
float32; of bfloat16, products take their operands rounded, but for those that
make the inverse.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import implementations
from kernels_pallas import interpret
from kernels_pallas.gated_delta_rule import cost
from kernels_pallas.gated_delta_rule import operands as operands_lib
from kernels_pallas.gated_delta_rule import shapes
from kernels_pallas.gated_delta_rule import tpu_plan
from kernels_pallas.gated_delta_rule.algebra import chunk as chunk_lib
from kernels_pallas.gated_delta_rule.algebra import fading
from kernels_pallas.gated_delta_rule.algebra import inverse
from kernels_pallas.gated_delta_rule.algebra import products
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.transformations import exported
from kernels_pallas.transformations import manual_axes

Config = tpu_plan.Config


def forward(
    operands: operands_lib.Operands,
    scale: float,
    config: implementations.Config,
) -> operands_lib.Results:
  """Computes the op.

  Raises:
    ValueError: If a TPU has no such type, or a step does not fit into VMEM.
  """
  plan = tpu_plan.Plan.of(operands, config)
  arrays, state = _cut(operands, plan), operands.state
  (out,), (state,) = _call(
      functools.partial(_forward, scale),
      plan,
      arrays,
      (state,),
      (_like(arrays[2]),),
      (_like(state),),
      _cost(cost.forward, operands, plan),
  )
  return _join(out, operands.query.shape[1]), state


def backward(
    operands: operands_lib.Operands,
    cotangents: operands_lib.Results,
    scale: float,
    config: implementations.Config,
) -> operands_lib.Operands:
  """Computes the cotangents; those of query and key for each of N heads."""
  plan = tpu_plan.Plan.of(operands, config)
  arrays, state = _cut(operands, plan), operands.state
  d_out = _to_chunks(cotangents[0], plan)
  length, num_heads = operands.value.shape[1:3]
  states = (*state.shape[:2], plan.grid[2], *state.shape[2:])
  of_starts = manual_axes.struct(states, state.dtype)
  _, (starts,) = _call(
      _advance,
      plan,
      arrays[1:],
      (state,),
      (),
      (of_starts,),
      _cost(cost.advance, operands, plan),
  )
  # Sums of several heads' are made of what is not rounded.
  wide = lambda x: jnp.float32 if plan.num_groups > 1 else x.dtype
  per_head = lambda x: manual_axes.struct(
      (x.shape[0], num_heads, *x.shape[2:]), wide(x)
  )
  query, key, value, log_decay, beta = arrays
  results = (per_head(query), per_head(key), *map(_like, arrays[2:]))
  del value, log_decay, beta
  found, (d_state,) = _call(
      functools.partial(_backward, scale),
      dataclasses.replace(plan, is_reversed=True),
      (*arrays, d_out),
      (starts, cotangents[1]),
      results,
      (_like(state),),
      _cost(cost.reverse, operands, plan),
  )
  joined = [_join(x, length) for x in found]
  d_query, d_key, d_value, d_log_decay, d_beta = joined
  return operands_lib.Operands(
      d_query, d_key, d_value, d_log_decay, d_beta[..., 0], d_state
  )


def _call(
    kernel: Callable[..., None],
    plan: tpu_plan.Plan,
    arrays: tuple[Array, ...],
    states: tuple[Array, ...],
    results: tuple[jax.ShapeDtypeStruct, ...],
    last: tuple[jax.ShapeDtypeStruct, ...],
    work: cost.Cost,
) -> tuple[list[Array], list[Array]]:
  """Runs a kernel over arrays and states, and so are its results."""
  sizes = states[0].shape[-2:]
  found = pl.pallas_call(
      kernel,
      grid=plan.grid,
      in_specs=[*map(plan.block, arrays), *map(plan.states, states)],
      out_specs=[*map(plan.block, results), *map(plan.states, last)],
      scratch_shapes=[pltpu.VMEM((plan.heads, *sizes), jnp.float32)],
      out_shape=[*results, *last],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "parallel", "arbitrary"),
          vmem_limit_bytes=tpu_plan.limit(),
      ),
      cost_estimate=exported.estimate(**dataclasses.asdict(work)),
      interpret=interpret.mode(),
      name="gated_delta_rule",
  )(*arrays, *states)
  return list(found[: len(results)]), list(found[len(results) :])


def _forward(scale: float, *refs: hw_types.Ref) -> None:
  *arrays, first, out, last, state = refs
  _start(state, first)
  run = lambda *x: chunk_lib.forward(*_parts(*x), inverse.Solver)
  found, state[...] = jax.vmap(run)(*_read(arrays), state[...])
  out[0] = (scale * found).astype(out.dtype)
  _end(state, last)


def _advance(*refs: hw_types.Ref) -> None:
  *arrays, first, starts, state = refs
  _start(state, first)
  starts[0, :, 0] = state[...]
  # It has no query, and none is read.
  run = lambda key, *x: chunk_lib.advance(*_parts(key, key, *x), inverse.Solver)
  state[...] = jax.vmap(run)(*_read(arrays), state[...])


def _backward(scale: float, *refs: hw_types.Ref) -> None:
  *arrays, d_out, starts, d_last = refs[:8]
  *results, d_beta, d_first, d_state = refs[8:]
  _start(d_state, d_last)

  def run(d_out: Array, d_state: Array, *x: Array) -> tuple[Array, ...]:
    chunk, fades = _parts(*x)
    found, d_logs = chunk_lib.backward(
        chunk, fades, d_out, d_state, inverse.Solver
    )
    return *found[:3], d_logs, products.to_row(found.beta), found.state

  d_out = scale * d_out[0].astype(jnp.float32)
  found = jax.vmap(run)(d_out, d_state[...], *_read(arrays), starts[0, :, 0])
  *found, d_row, d_state[...] = found
  d_beta[0, :, 0] = d_row
  for place, x in zip(results, found, strict=True):
    if len(place.shape) == 5:
      place[0, :, 0] = x
    else:
      place[0] = x.astype(place.dtype)
  _end(d_state, d_first)


def _start(state: hw_types.Ref, first: hw_types.Ref) -> None:
  @pl.when(pl.program_id(2) == 0)
  def _():
    state[...] = first[0]


def _end(state: hw_types.Ref, last: hw_types.Ref) -> None:
  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    last[0] = state[...]


def _read(arrays: list[hw_types.Ref]) -> list[Array]:
  """Of the heads of a step, of which key heads may be fewer."""
  num_heads = arrays[-1].shape[1]
  found = (x[0, :, 0] if len(x.shape) == 5 else x[0] for x in arrays)
  return [
      jnp.repeat(x, num_heads // x.shape[0], axis=0)
      if x.shape[0] < num_heads
      else x
      for x in found
  ]


def _parts(
    query: Float[Array, "C H"],
    key: Float[Array, "C H"],
    value: Float[Array, "C J"],
    log_decay: Float[Array, "_ _"],
    beta: Float[Array, "1 C"],
    state: Float[Array, "H J"],
) -> tuple[chunk_lib.Chunk, fading.Fading]:
  """What the algebra takes, of one head."""
  by_head = log_decay.shape == beta.shape
  fades_of = fading.ByHead.of if by_head else fading.ByChannel.of
  fades = fades_of(products.Products(key.dtype, in_kernel=True), log_decay)
  query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
  beta = products.to_column(beta)
  return chunk_lib.Chunk(query, key, value, beta, state), fades


def _cut(
    operands: operands_lib.Operands, plan: tpu_plan.Plan
) -> tuple[Array, ...]:
  """Query, key, value, log_decay and beta; numbers of a head are rows."""
  query, key, value, log_decay, beta, _ = operands
  rows = (log_decay, beta) if log_decay.shape[3] == 1 else (beta,)
  arrays = [query, key, value, log_decay][: 5 - len(rows)]
  batch, heads, num_chunks = plan.grid
  shape = (batch, heads * plan.heads, num_chunks, 1, plan.chunk)
  cut = functools.partial(_to_chunks, plan=plan)
  as_row = lambda x: cut(x.reshape(*x.shape[:3], 1)).reshape(shape)
  return (*map(cut, arrays), *map(as_row, rows))


def _to_chunks(x: Float[Array, "B T n H"], plan: tpu_plan.Plan) -> Array:
  """By heads, to whole chunks: zeros leave a state as it is."""
  return tpu_layout.pad(tpu_layout.to_heads(x), 2, plan.chunk)


def _join(x: Array, length: int) -> Float[Array, "B T n H"]:
  if x.ndim == 5:
    x = x.reshape(*x.shape[:2], -1, 1)
  return tpu_layout.to_heads(x[:, :, :length])


def _cost(
    of: Callable[..., cost.Cost],
    operands: operands_lib.Operands,
    plan: tpu_plan.Plan,
) -> cost.Cost:
  batch, length, num_heads, value_size = operands.value.shape
  num_key_heads, key_size = operands.key.shape[2:]
  shape = shapes.Shape(
      batch=batch,
      length=length,
      num_heads=num_heads,
      num_key_heads=num_key_heads,
      key_size=key_size,
      value_size=value_size,
      is_by_channel=operands.log_decay.shape[3] > 1,
  )
  return of(shape, plan.chunk, itemsize=operands.query.dtype.itemsize)


def _like(x: Array) -> jax.ShapeDtypeStruct:
  return manual_axes.struct(x.shape, x.dtype)
