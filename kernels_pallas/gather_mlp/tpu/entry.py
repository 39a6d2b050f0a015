"""A gathered MLP on a TPU: one kernel forward, one backward.

The blocks of the plan are copied from HBM one ahead of their use, a piece of
each matrix at a time, and both products, biases and the activation are made
while they are in VMEM: a chosen weight crosses the memory bus once, and nothing
else of its size does. Backward reads the same pieces once more, makes what the
neurons were again, and writes the gradients of a piece to its place.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import activations
from kernels_pallas import interpret
from kernels_pallas.gather_mlp import cost
from kernels_pallas.gather_mlp import parts
from kernels_pallas.gather_mlp.tpu import config as tpu_config
from kernels_pallas.gather_mlp.tpu import heads as tpu_heads
from kernels_pallas.gather_mlp.tpu import stream as tpu_stream
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import tpu_tile
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.transformations import exported
from kernels_pallas.transformations import manual_axes

Config = tpu_config.Config
into_heads = tpu_heads.into_heads
out_of_heads = tpu_heads.out_of_heads

_LAST_BY_LAST = (((1,), (1,)), ((), ()))
_LAST_BY_FIRST = (((1,), (0,)), ((), ()))
_FIRST_BY_FIRST = (((0,), (0,)), ((), ()))
_ACTIVATIONS = activations.ACTIVATIONS | {"gelu": activations.gelu_by_erf}


def forward(given: parts.Given, spec: parts.Spec) -> Float[Array, "B D"]:
  """Computes the op without `down_bias`, in float32.

  Raises:
    ValueError: If a TPU has no such type, or nothing fits into VMEM.
  """
  x, weights, plan = given
  call = _Call(x, weights, plan, spec, is_backward=False)
  out = call.run(
      functools.partial(_forward_kernel, call),
      [call.x],
      out_shape=[manual_axes.struct(call.totals, jnp.float32)],
      out_specs=[call.total_spec],
      scratch=[],
      name="gather_mlp",
  )
  return out[0].sum(axis=0)[: x.shape[0]]


def backward(
    given: parts.Given, d_out: Float[Array, "B D"], spec: parts.Spec
) -> tuple[Float[Array, "B D"], parts.Weights]:
  """Cotangents of x, in float32, and of the weights."""
  x, weights, plan = given
  call = _Call(x, weights, plan, spec, is_backward=True)
  # Gradients of several tiles of sequences are added up in HBM, where bfloat16
  # would be rounded each time.
  kind = jnp.float32 if call.is_cut else x.dtype
  zeros = [jnp.zeros(m.shape, kind) for m in call.matrices]
  # Biases are few: their gradients are kept by entry of the plan, and put in
  # their places by XLA.
  lists = (call.num_cores, plan.blocks.shape[0] * call.parts, call.rows)
  list_spec = pl.BlockSpec((1, *lists[1:]), lambda core, tile, *_: (core, 0, 0))
  any_spec = pl.BlockSpec(memory_space=pl.ANY)
  num_biases = len(call.biases)
  slab = pltpu.VMEM((2, call.rows, x.shape[1]), kind)
  out = call.run(
      functools.partial(_backward_kernel, call),
      [call.x, call.pad(d_out.astype(x.dtype))],
      sums=zeros,
      out_shape=[
          manual_axes.struct(call.totals, jnp.float32),
          *(manual_axes.struct(lists, jnp.float32) for _ in call.biases),
          *(manual_axes.struct(z.shape, z.dtype) for z in zeros),
      ],
      out_specs=[
          call.total_spec,
          *[list_spec] * num_biases,
          *[any_spec] * len(zeros),
      ],
      scratch=[
          *[slab] * len(zeros),
          pltpu.SemaphoreType.DMA((len(zeros), 2)),
      ],
      name="gather_mlp_backward",
  )
  d_x = out[0].sum(axis=0)[: x.shape[0]]
  d_biases = [call.to_blocks(d) for d in out[1 : 1 + num_biases]]
  return d_x, call.weights_of(out[1 + num_biases :], d_biases)


class _Call:
  """Sizes, padded arrays and blocks of a call.

  `matrices` are up, down and the gate if there is one; `biases` those that
  there are, of up and of the gate.
  """

  def __init__(
      self,
      x: jax.Array,
      weights: parts.Weights,
      plan: parts.Plan,
      spec: parts.Spec,
      is_backward: bool,
  ):
    self.plan, self.spec, self.is_backward = plan, spec, is_backward
    self.matrices = [weights.up, weights.down]
    if weights.gate is not None:
      self.matrices.append(weights.gate)
    self.has_bias = [weights.up_bias is not None, weights.gate_bias is not None]
    self.num_cores = tpu_layout.tpu_info().num_cores
    tiles = tpu_config.choose(
        spec.config or Config(),
        tpu_config.Sizes(
            batch=x.shape[0],
            width=x.shape[1],
            block_size=spec.block_size,
            num_entries=plan.blocks.shape[0],
            num_neurons=weights.up.shape[0],
            num_matrices=len(self.matrices),
            dtype=x.dtype,
            has_members=plan.member is not None,
            num_biases=sum(self.has_bias),
        ),
        is_backward,
    )
    self.rows, self.batch = tiles.rows, tiles.batch
    self.parts = spec.block_size // self.rows
    self.x = self.pad(x)
    self.num_tiles = self.x.shape[0] // self.batch
    # Whether there may be several tiles.
    self.is_cut = exported.known(self.num_tiles, 2) > 1
    biases = (weights.up_bias, weights.gate_bias)
    self.biases = [
        b.astype(jnp.float32).reshape(-1, self.rows)
        for b in biases
        if b is not None
    ]
    # Each core adds up its own visits; the sums of both are added outside.
    self.totals = (self.num_cores, *self.x.shape)
    self.total_spec = pl.BlockSpec(
        (1, self.batch, x.shape[1]), lambda core, tile, *_: (core, tile, 0)
    )

  def pad(self, x: jax.Array) -> jax.Array:
    """The batch to whole tiles."""
    return jnp.pad(x, ((0, -x.shape[0] % self.batch), (0, 0)))

  def run(
      self,
      kernel: Callable[..., None],
      rows: Sequence[jax.Array],
      *,
      sums: Sequence[jax.Array] = (),
      out_shape: Sequence[jax.ShapeDtypeStruct],
      out_specs: Sequence[pl.BlockSpec],
      scratch: Sequence[hw_types.Buffer],
      name: str,
  ) -> Sequence[jax.Array]:
    """Runs a kernel on arrays by sequence, and `sums`, which become outputs."""
    plan, width = self.plan, self.x.shape[1]
    by_tile = lambda size: pl.BlockSpec(
        (self.batch, size), lambda core, tile, *_: (tile, 0)
    )
    arrays, specs = list(rows), [by_tile(width)] * len(rows)
    if plan.member is not None:
      arrays.append(self.pad(plan.member.astype(jnp.float32)))
      specs.append(by_tile(plan.blocks.shape[0]))
    arrays += self.biases
    specs += [pl.BlockSpec(b.shape, lambda *_: (0, 0)) for b in self.biases]
    arrays += [*self.matrices, *sums]
    specs += [pl.BlockSpec(memory_space=pl.ANY)] * (
        len(self.matrices) + len(sums)
    )
    streamed = [*self.matrices, *(sums if self.is_cut else ())]
    # The table of blocks is an operand, too: the first one.
    first_in = 1 + len(arrays) - len(sums)
    first_out = len(out_shape) - len(sums)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(self.num_cores, self.num_tiles),
            in_specs=specs,
            out_specs=out_specs,
            scratch_shapes=[
                *tpu_stream.scratch(streamed, self.rows),
                *scratch,
            ],
        ),
        out_shape=out_shape,
        input_output_aliases={
            first_in + i: first_out + i for i in range(len(sums))
        },
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tpu_config.limit(),
        ),
        cost_estimate=self._cost(),
        interpret=interpret.mode(),
        name=name,
    )(tpu_stream.table_of(plan), *arrays)

  def refs(
      self, num_rows: int, refs: Sequence[hw_types.Ref]
  ) -> tuple[Any, ...]:
    """Refs by purpose, in the order of `run`: see the kernels."""
    refs = list(refs)
    take = lambda n: [refs.pop(0) for _ in range(n)]
    table = take(1)[0]
    rows = take(num_rows)
    member = take(1)[0] if self.plan.member is not None else None
    biases = take(len(self.biases))
    matrices = take(len(self.matrices))
    num_sums = len(matrices) if self.is_backward else 0
    old = take(num_sums)
    totals = take(1)[0]
    d_biases = take(len(biases) if self.is_backward else 0)
    new = take(num_sums)
    # Outputs are the inputs that they alias; of one tile nothing is read back.
    streamed = matrices + (new if self.is_cut else [])
    del old
    buffers = take(len(streamed))
    stream = tpu_stream.Stream(
        table,
        self.parts,
        self.num_cores,
        streamed,
        self.rows,
        buffers,
        take(1)[0],
    )
    return rows, member, biases, stream, totals, d_biases, new, refs

  def row_of(self, bias: hw_types.Ref, visit: tpu_stream.Visit) -> jax.Array:
    """The biases of a slab, [1, rows]."""
    return bias[pl.ds(visit.slab, 1)]

  def to_blocks(self, by_entry: jax.Array) -> jax.Array:
    """[cores, U parts, rows] to [F]: what no entry names is 0."""
    neurons = self.matrices[0].shape[0]
    by_entry = by_entry.sum(axis=0).reshape(-1, self.spec.block_size)
    zeros = jnp.zeros((neurons // self.spec.block_size, by_entry.shape[1]))
    return zeros.at[self.plan.blocks].add(by_entry).reshape(-1)

  def weights_of(
      self, matrices: Sequence[jax.Array], biases: Sequence[jax.Array]
  ) -> parts.Weights:
    """Gradients as weights."""
    biases = list(biases)
    up_bias, gate_bias = (
        biases.pop(0) if has_bias else None for has_bias in self.has_bias
    )
    up, down, *gates = matrices
    gate = gates[0] if gates else None
    return parts.Weights(up, down, gate, up_bias, gate_bias)

  def _cost(self) -> pl.CostEstimate | None:
    cost_of = cost.backward_of if self.is_backward else cost.forward_of
    found = cost_of(
        cost.Work(
            self.x.shape[0],
            self.x.shape[1],
            self.plan.blocks.shape[0] * self.spec.block_size,
            self.matrices[0].shape[0],
            len(self.matrices),
            self.x.dtype.itemsize,
            self.num_tiles,
        )
    )
    return exported.estimate(
        flops=found.flops,
        bytes_accessed=found.bytes_accessed,
        transcendentals=found.transcendentals,
    )


def _forward_kernel(call: _Call, *refs: hw_types.Ref) -> None:
  (x,), member, biases, stream, out, _, _, _ = call.refs(1, refs)
  out[...] = jnp.zeros_like(out)

  def see(visit: tpu_stream.Visit, slabs: list[jax.Array]) -> None:
    neurons = _Neurons(call, x[...], slabs, biases, visit)
    hidden = neurons.act(*neurons.pre)
    hidden = _of_members(member, visit, hidden).astype(x.dtype)
    out[0] += tpu_tile.multiply(hidden, slabs[1], _LAST_BY_FIRST)

  stream.walk(see)


def _backward_kernel(call: _Call, *refs: hw_types.Ref) -> None:
  found = call.refs(2, refs)
  (x, d_out), member, biases, stream, d_x, d_biases, new, rest = found
  *staged, semaphores = rest
  num = len(call.matrices)
  # The output's block is of this tile alone and stays while slabs go by.
  d_x[...] = jnp.zeros_like(d_x)

  @pl.when(pl.program_id(1) == 0)
  def _():
    for ref in d_biases:
      ref[...] = jnp.zeros_like(ref)

  def copies(visit: tpu_stream.Visit) -> list[hw_types.Copy]:
    return [
        pltpu.make_async_copy(
            stage.at[visit.slot],
            stream.place(ref, visit),
            semaphores.at[k, visit.slot],
        )
        for k, (stage, ref) in enumerate(zip(staged, new, strict=True))
    ]

  def wait(visit: tpu_stream.Visit) -> None:
    for copy in copies(visit):
      copy.wait()

  def see(visit: tpu_stream.Visit, slabs: list[jax.Array]) -> None:
    slabs, old = slabs[:num], slabs[num:]
    neurons = _Neurons(call, x[...], slabs, biases, visit)
    # What neurons were is made again from the slab, rather than read from HBM.
    hidden, pullback = jax.vjp(neurons.act, *neurons.pre)
    hidden = _of_members(member, visit, hidden).astype(x.dtype)
    multiply = tpu_tile.multiply
    d_hidden = multiply(d_out[...], slabs[1], _LAST_BY_LAST)
    d_pre = pullback(_of_members(member, visit, d_hidden))
    # By up, down and the gate: who reads x, and hidden.
    pairs = [(d_pre[0].astype(x.dtype), x), (hidden, d_out)]
    pairs += [(d.astype(x.dtype), x) for d in d_pre[1:]]
    for (d, _), slab in zip(pairs[::2], slabs[::2], strict=True):
      d_x[0] += multiply(d, slab, _LAST_BY_FIRST)
    # The buffer's earlier gradient must have left before it is overwritten.
    is_reused = visit.number - 2 >= low
    pl.when(is_reused)(lambda: wait(visit))  # The same sizes, two visits ago.
    for k, (stage, (d, other)) in enumerate(zip(staged, pairs, strict=True)):
      product = multiply(d, other[...], _FIRST_BY_FIRST)
      product = product + old[k] if old else product
      stage[visit.slot] = product.astype(stage.dtype)
    for copy in copies(visit):
      copy.start()
    wanted = [d for d, has in zip(d_pre, call.has_bias, strict=False) if has]
    for ref, d in zip(d_biases, wanted, strict=True):
      here = pl.ds(visit.number, 1)
      ref[0, here] = ref[0, here] + d.sum(axis=0, keepdims=True)

  # The last two writes have nobody after them who would wait.
  low, high = stream.bounds()
  stream.walk(see)
  for behind in (2, 1):
    last = high - behind
    pl.when(last >= low)(lambda last=last: wait(stream.visit(last)))


class _Neurons:
  """The neurons of a slab, for a tile of sequences.

  Attributes:
    pre: What goes into `act`: that of up, and of the gate if there is one.
  """

  def __init__(
      self,
      call: _Call,
      x: jax.Array,
      slabs: list[jax.Array],
      biases: list[hw_types.Ref],
      visit: tpu_stream.Visit,
  ):
    self._call, biases = call, list(biases)
    self.pre = []
    for matrix, has_bias in zip(slabs[::2], call.has_bias, strict=False):
      pre = tpu_tile.multiply(x, matrix, _LAST_BY_LAST)
      bias = call.row_of(biases.pop(0), visit) if has_bias else 0.0
      self.pre.append(pre + bias)

  def act(self, pre: jax.Array, gate: jax.Array | None = None) -> jax.Array:
    """What they give to their rows of down."""
    activation = _ACTIVATIONS[self._call.spec.activation]
    return activation(pre) if gate is None else activation(gate) * pre


def _of_members(
    member: hw_types.Ref | None, visit: tpu_stream.Visit, hidden: jax.Array
) -> jax.Array:
  """0 for sequences that did not choose the block."""
  if member is None:
    return hidden
  entry = jax.lax.broadcasted_iota(jnp.int32, member.shape, 1)
  here = jnp.where(entry == visit.entry, member[...], 0.0)
  return jnp.where(here.sum(axis=1, keepdims=True) > 0, hidden, 0.0)
