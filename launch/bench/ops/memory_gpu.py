"""Decode, gathered MLP and linear attention on a GPU: rows of their times.

The part of `launch.bench.ops.gpu` for what is bound by memory: bytes are
those that must be moved, and are compared with a copy of the same run. Decode
with all of 32,768 slots stands beside 4,096 kept of them; a gathered MLP beside
the dense one; linear attention at growing lengths, with the slope of log time
over log T, which is 1 for linear and 2 for quadratic work.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
import numpy as np

from kernels_pallas import implementations as implementations_lib
from kernels_pallas.decode import cost as decode_cost
from kernels_pallas.decode import slots as slots_lib
from kernels_pallas.gather_mlp import cost as gather_cost
from kernels_pallas.gather_mlp import shapes as gather_shapes
from kernels_pallas.linear_attention import cost as linear_cost
from launch.bench import harness
from launch.bench.ops import gpu_rows
from launch.bench.ops import peers as peers_lib
from launch.bench.ops import programs

# Positions of a chunk, for the count of operations.
_CHUNK = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What is measured.

  Attributes:
    batches: Sequences that decode together.
    capacities: Slots, all of them first.
    mlps: Names in `gather_mlp.shapes.BENCHMARKS`.
    density: Share of an MLP's blocks that is chosen.
    lengths: T of linear attention, two at least for a slope; none leaves it
      out.
    implementations: Whose.
  """

  batches: Sequence[int] = (1, 8)
  capacities: Sequence[int] = (32_768, 4096)
  mlps: Sequence[str] = tuple(gather_shapes.BENCHMARKS)
  density: float = 0.1
  lengths: Sequence[int] = (4096, 8192, 16_384, 32_768, 65_536)
  implementations: Sequence[implementations_lib.Implementation] = (
      "pallas_gpu",
      "xla",
  )


def decode_jobs(timer: gpu_rows.Timer, sizes: Sizes) -> Iterator[gpu_rows.Job]:
  """A step over the cache, in place; and attention alone, by others."""
  for batch, capacity in itertools.product(sizes.batches, sizes.capacities):
    shape = programs.decode_shape(batch, capacity)
    case = f"B={batch} C={capacity} N=32 K=8 H=128"
    for name, dtype in itertools.product(
        sizes.implementations, ("bfloat16", "int8")
    ):
      fn, arrays = programs.decode_on(batch, capacity, dtype, name)
      work = decode_cost.step(shape, cache_itemsize=jnp.dtype(dtype).itemsize)
      run = gpu_rows.timed(
          timer,
          fn,
          functools.partial(_drawn, arrays),
          work=(0, work.bytes_accessed),
          is_in_place=True,
      )
      what = "decode" if dtype == "bfloat16" else f"decode {dtype}"
      yield gpu_rows.Job(what, name, case, run)
    for by in ("cudnn", "xla"):
      fn, arrays = peers_lib.attend_alone(batch, capacity, by)
      num_bytes = sum(2 * x.size for x in (*arrays, arrays[0]))
      make = functools.partial(_drawn, arrays)
      run = gpu_rows.timed(timer, fn, make, work=(0, num_bytes))
      yield gpu_rows.Job("decode, attention alone", by, case, run)


def mlp_jobs(timer: gpu_rows.Timer, sizes: Sizes) -> Iterator[gpu_rows.Job]:
  """Chosen blocks beside all of them, and gradients."""
  for name, is_backward in itertools.product(sizes.mlps, (False, True)):
    shape = gather_shapes.BENCHMARKS[name]
    count = gather_cost.backward if is_backward else gather_cost.forward
    for density, peer in (
        *((sizes.density, peer) for peer in sizes.implementations),
        (1.0, "xla"),  # All blocks are computed as the dense MLP.
    ):
      fn, arrays = programs.gather_mlp(name, density, is_backward, peer)
      work = count(shape, programs.num_chosen(name, density))
      run = gpu_rows.timed(
          timer,
          fn,
          functools.partial(_drawn, arrays),
          work=(work.flops, work.bytes_accessed),
      )
      what = f"MLP at {density:.0%}" if density < 1 else "dense MLP"
      what += " gradients" if is_backward else ""
      yield gpu_rows.Job(what, peer, name, run)


def linear_jobs(timer: gpu_rows.Timer, sizes: Sizes) -> Iterator[gpu_rows.Job]:
  """Each length, then the slope over all that were timed."""
  peers = sizes.implementations if sizes.lengths else ()
  for peer, is_backward in itertools.product(peers, (False, True)):
    what = "linear attention" + (" gradients" if is_backward else "")
    seconds: dict[int, float] = {}  # Of the lengths so far, for the slope.
    for length in sizes.lengths:
      fn, arrays = programs.linear(length, is_backward, peer)
      count = linear_cost.backward if is_backward else linear_cost.forward
      work = count(programs.linear_shape(length), _CHUNK)
      timed = gpu_rows.timed(
          timer,
          fn,
          functools.partial(_drawn, arrays),
          work=(work.flops, work.bytes_accessed),
      )
      run = functools.partial(_kept, seconds, length, timed)
      yield gpu_rows.Job(what, peer, f"T={length} N=16 H=128", run)
    slope = functools.partial(_slope, seconds)
    yield gpu_rows.Job(f"{what}, slope", peer, "log time over log T", slope)


def error_jobs(sizes: Sizes, ops: Sequence[str]) -> Iterator[gpu_rows.Job]:
  """Distance of our kernels to float64, at the least of the sizes."""
  if "decode" in ops:
    capacity = min(sizes.capacities)
    for dtype, reduce in (("bfloat16", "sum"), ("int8", "max")):
      ours, exact = (
          _decode_from(capacity, dtype, reduce, implementation)
          for implementation in ("pallas_gpu", "reference")
      )
      make = lambda capacity=capacity: _drawn(
          programs.decode_on(2, capacity)[1][:3], 0
      )
      run = functools.partial(peers_lib.relative_error, ours, exact, make)
      case = f"B=2 C={capacity} {dtype} {reduce}"
      yield gpu_rows.Job("error of decode", "pallas_gpu", case, run)
  chosen: list[tuple[str, Callable[..., programs.Program], str | int]] = []
  if "mlp" in ops:
    chosen += [("MLP", programs.gather_mlp, x) for x in sizes.mlps[:1]]
  if "attention" in ops and sizes.lengths:
    least = min(sizes.lengths)
    chosen += [("linear attention", programs.linear, least)]
  for (what, program, size), is_backward in itertools.product(
      chosen, (False, True)
  ):
    given = (size, sizes.density) if what == "MLP" else (size,)
    build = functools.partial(program, *given, is_backward)
    (ours, arrays), (exact, _) = build("pallas_gpu"), build("reference")
    flat, treedef = jax.tree.flatten(arrays)
    run = functools.partial(
        peers_lib.relative_error,
        functools.partial(_of_leaves, ours, treedef),
        functools.partial(_of_leaves, exact, treedef),
        functools.partial(_drawn, tuple(flat), 0, 0.1),
    )
    what = f"error of {what}" + (" gradients" if is_backward else "")
    yield gpu_rows.Job(what, "pallas_gpu", str(size), run)


def _drawn(arrays: PyTree, seed: int, size: float = 1.0) -> PyTree:
  """Normal numbers, full caches, and the position after the last of them."""
  keys = itertools.count(1000 * seed)

  def draw(x: PyTree) -> PyTree:
    if isinstance(x, slots_lib.Slots):
      fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
      made: dict[str, Any] = {
          k: None if v is None else draw(v) for k, v in fields.items()
      }
      pos = jnp.broadcast_to(
          jnp.arange(x.capacity, dtype=jnp.int32), x.pos.shape
      )
      score = jnp.abs(made["score"])
      return slots_lib.Slots(**made | {"pos": pos + 0, "score": score})
    if x.dtype == jnp.int8:
      steps = 40 * peers_lib.normal(next(keys), x.shape, jnp.bfloat16)
      return jnp.clip(steps, -127, 127).astype(jnp.int8)
    if x.dtype == jnp.int32:  # Of the new tokens.
      return jnp.full(x.shape, 1 << 20, jnp.int32)
    return size * peers_lib.normal(next(keys), x.shape, x.dtype)

  is_cache = lambda x: isinstance(x, slots_lib.Slots)
  return jax.tree.map(draw, arrays, is_leaf=is_cache)


def _decode_from(
    capacity: int,
    dtype: str,
    reduce: Literal["sum", "max"],
    implementation: implementations_lib.Implementation,
) -> Callable[..., tuple[Array, Array]]:
  """Out and scores of a step from a cache that is drawn, the same for all."""
  fn, arrays = programs.decode_on(2, capacity, dtype, implementation, reduce)

  def run(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    cache, positions = _drawn(arrays[3:], 1)
    result = fn(query, key, value, cache, positions)
    return result[0], result[3].score

  return run


def _of_leaves(
    fn: Callable[..., PyTree], treedef: jax.tree_util.PyTreeDef, *leaves: Array
) -> PyTree:
  return fn(*jax.tree.unflatten(treedef, leaves))


def _kept(
    milliseconds: dict[int, float], length: int, run: Callable[[], harness.Row]
) -> harness.Row:
  """Runs, and keeps the time of this length."""
  figures = run()
  milliseconds[length] = figures["median_ms"]
  return figures


def _slope(milliseconds: Mapping[int, float]) -> harness.Row:
  """Least squares of log time over log T.

  Raises:
    ValueError: If fewer than two lengths were timed.
  """
  if len(milliseconds) < 2:
    raise ValueError("fewer than two lengths were timed: no slope")
  lengths, times = (
      np.log(np.array([*x], float))
      for x in (milliseconds.keys(), milliseconds.values())
  )
  return {"slope": float(np.polyfit(lengths, times, 1)[0])}
