"""Linear attention on a TPU: one kernel, for the forward and the backward.

A step of the grid is a chunk of a head. The state stays in VMEM from chunk to
chunk, and so do the powers of the decay between positions of a chunk, which are
made at the first. What is summed is float32; of bfloat16, products take the
weights and the state rounded, as their other operand is.
"""

import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from kernels_pallas import interpret
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import tpu_tile
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.linear_attention import cost
from kernels_pallas.linear_attention import shapes
from kernels_pallas.linear_attention import sweep as sweep_lib
from kernels_pallas.transformations import exported
from kernels_pallas.transformations import manual_axes

_LANES = tpu_layout.LANES
_MIB = 1 << 20
_LAST_BY_LAST = (((1,), (1,)), ((), ()))
_LAST_BY_FIRST = (((1,), (0,)), ((), ()))
_FIRST_BY_FIRST = (((0,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes.

  Attributes:
    chunk: Positions of a step, a multiple of the 128 lanes; None is twice the
      side of a matrix unit, where static schedules of heads of 128 are lowest.
  """

  chunk: int | None = None

  def __post_init__(self):
    tpu_layout.check_lanes("chunk", self.chunk)


def run(
    operands: sweep_lib.Operands, sweep: sweep_lib.Sweep
) -> sweep_lib.Swept:
  """One sweep, see `sweep`.

  Raises:
    ValueError: If a TPU has no such type, or the chunk does not fit into VMEM.
  """
  query, key, value, log_decay, state = operands
  _check_type(query.dtype)
  (batch, length, _, head_dim), num_heads = query.shape, log_decay.shape[0]
  asked = (sweep.config or Config()).chunk
  # What a chunk computes above its diagonal is thrown away, and a short one
  # does not fill the matrix unit.
  chunk = asked or 2 * tpu_layout.tpu_info().mxu_column_size
  chunk = min(chunk, tpu_layout.round_up(length, _LANES))
  out_dtype = jnp.float32 if sweep.is_out_wide else query.dtype
  _check_vmem(chunk, head_dim, query.dtype.itemsize)
  arrays = [_pad(tpu_layout.to_heads(x), chunk) for x in (query, key, value)]
  num_chunks = arrays[0].shape[2] // chunk
  block = functools.partial(_block, sweep, num_chunks, num_heads)
  states = pl.BlockSpec(
      (1, 1, head_dim, head_dim), lambda b, n, c, _: (b, n, 0, 0)
  )
  out_shape = (batch, num_heads, num_chunks * chunk, head_dim)
  out, state = pl.pallas_call(
      functools.partial(_kernel, sweep, length, num_chunks),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          grid=(batch, num_heads, num_chunks),
          in_specs=[
              *(block(x.shape[1], chunk, head_dim) for x in arrays),
              states,
          ],
          out_specs=[block(num_heads, chunk, head_dim), states],
          scratch_shapes=[
              pltpu.VMEM((head_dim, head_dim), jnp.float32),
              pltpu.VMEM((chunk, chunk), jnp.float32),
          ],
      ),
      out_shape=[
          manual_axes.struct(out_shape, out_dtype),
          manual_axes.struct(state.shape, state.dtype),
      ],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "parallel", "arbitrary"),
          vmem_limit_bytes=_limit(),
      ),
      cost_estimate=_cost(query, key, value, num_heads, chunk, out_dtype),
      interpret=interpret.mode(),
      name="linear_attention",
  )(log_decay, *arrays, state)
  return tpu_layout.to_heads(out[:, :, :length]), state


def vmem(chunk: int, head_dim: int, itemsize: int) -> dict[str, int]:
  """Bytes of VMEM that a sweep takes at most, by what for.

  Blocks are there twice, to be copied ahead. Registers that run out are part of
  it: as compiled kernels show, up to one and a half chunks of weights, and a
  state.
  """
  lanes = tpu_layout.round_up(head_dim, _LANES)
  state = 4 * tpu_layout.round_up(head_dim, 8) * lanes
  return {
      "query, key, value and out": 2 * chunk * lanes * (3 * itemsize + 4),
      "states": (2 * 2 + 1) * state,
      "powers": 4 * chunk**2,
      "registers": _MIB + 6 * chunk**2 + 8 * chunk * lanes + state,
  }


def _kernel(
    sweep: sweep_lib.Sweep,
    length: int,
    num_chunks: int,
    log_decay: hw_types.Ref,
    query: hw_types.Ref,
    key: hw_types.Ref,
    value: hw_types.Ref,
    first: hw_types.Ref,
    *rest: hw_types.Ref,
) -> None:
  out, last, state, powers = rest
  step = pl.program_id(2)
  rate = log_decay[pl.program_id(1)]
  chunk, head_dim = query.shape[2:]

  @pl.when(step == 0)
  def _():
    state[...] = first[0, 0]
    powers[...] = _powers(sweep, rate, chunk)

  # The state goes against the order of positions; each chunk within itself,
  # too.
  index = num_chunks - 1 - step if sweep.is_reversed else step
  size = jnp.minimum(chunk, length - index * chunk)
  position = jax.lax.broadcasted_iota(jnp.int32, (chunk, head_dim), 0)
  # Steps from the chunk's start to a position, and from there to its end.
  before, after = position + 1, jnp.maximum(size - 1 - position, 0)
  if sweep.is_reversed:
    before, after = after, before
  power = lambda exponent: jnp.exp(rate * exponent.astype(jnp.float32))
  query, key, value = query[0, 0], key[0, 0], value[0, 0]
  multiply, narrow = tpu_tile.multiply, query.dtype
  attn = multiply(query, key, _LAST_BY_LAST) * powers[...]
  read = multiply(query, state[...].astype(narrow), _LAST_BY_FIRST)
  result = multiply(attn.astype(narrow), value, _LAST_BY_FIRST)
  result += sweep.out_scale * power(before) * read
  out[0, 0] = result.astype(out.dtype)
  added = (sweep.in_scale * power(after) * key).astype(narrow)
  # By the chunk's real length: padding must not decay the state.
  kept = power(jnp.full((1, head_dim), size, jnp.int32)) * state[...]
  state[...] = kept + multiply(added, value, _FIRST_BY_FIRST)

  @pl.when(step == num_chunks - 1)
  def _():
    last[0, 0] = state[...]


def _powers(sweep: sweep_lib.Sweep, rate: jax.Array, chunk: int) -> jax.Array:
  """Scaled powers of the decay between positions; 0 where not causal."""
  row, column = (
      jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), i) for i in (0, 1)
  )
  ago = column - row if sweep.is_reversed else row - column
  power = jnp.exp(rate * jnp.maximum(ago, 0).astype(jnp.float32))
  return jnp.where(ago >= 0, sweep.in_scale * sweep.out_scale * power, 0.0)


def _block(
    sweep: sweep_lib.Sweep,
    num_chunks: int,
    num_heads: int,
    heads: int,
    chunk: int,
    head_dim: int,
) -> pl.BlockSpec:
  """A chunk of an array with `heads` heads, which divide the grid's."""
  num_groups = num_heads // heads

  def index(
      b: hw_types.Index, n: hw_types.Index, c: hw_types.Index, _: hw_types.Ref
  ) -> tuple[hw_types.Index, ...]:
    c = num_chunks - 1 - c if sweep.is_reversed else c
    return b, n // num_groups, c, 0

  return pl.BlockSpec((1, 1, chunk, head_dim), index)


def _pad(x: jax.Array, chunk: int) -> jax.Array:
  """To whole chunks: zeros add nothing to a state."""
  return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % chunk), (0, 0)))


def _limit() -> int:
  """Bytes of VMEM that a kernel here may take."""
  return tpu_layout.tpu_info().vmem_capacity_bytes * 15 // 16


def _check_type(dtype: jax.typing.DTypeLike) -> None:
  if dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(
        f"query, key and value are {dtype}; the TPU kernels take float32 and"
        " bfloat16"
    )


def _check_vmem(chunk: int, head_dim: int, itemsize: int) -> None:
  need = vmem(chunk, head_dim, itemsize)
  if sum(need.values()) > _limit():
    what = f"chunk={chunk} with head_dim={head_dim} needs"
    message = tpu_layout.over_vmem(what, need, _limit())
    raise ValueError(f"{message}: use a smaller chunk")


def _cost(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    num_heads: int,
    chunk: int,
    out_dtype: jax.typing.DTypeLike,
) -> pl.CostEstimate | None:
  batch, length, _, head_dim = query.shape
  heads = [x.shape[2] for x in (query, key, value)]
  shape = shapes.Shape(
      batch=batch,
      length=length,
      num_heads=num_heads,
      num_kv_heads=min(heads),
      head_dim=head_dim,
  )
  work = cost.sweep(
      shape,
      chunk,
      itemsize=query.dtype.itemsize,
      out_itemsize=jnp.dtype(out_dtype).itemsize,
      num_shared=sum(n < num_heads for n in heads),
  )
  return exported.estimate(**dataclasses.asdict(work))
