"""Measures the GPU kernels beside cuDNN, XLA and jax's own attention.

  python -m launch.bench.kernels --target=gpu --ops=decode --ops=mlp

needs a Hopper GPU and jax >= 0.11.2, and ends within ten minutes: what the chip
can do first (a product of matrices, a copy), then how far results are from
float64, then times, as `gpu_rows` takes them. Each row is printed when it is
known, and a row that fails says why and costs no other. Not run yet: there is
no GPU where it was written.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import functools
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks
from kernels_pallas.attention import api
from kernels_pallas.attention import cost
from kernels_pallas.attention import shapes
from launch.bench import harness
from launch.bench.ops import gpu_rows
from launch.bench.ops import memory_gpu
from launch.bench.ops import peers as peers_lib
from launch.bench.ops import programs

# Twice the second-level cache of an H100 or H200.
_ROTATED_BYTES = 2 * 50 * 2**20
_CALLS_PER_SYNC = 50
_TOKENS = 16_384

OPS = ("attention", "decode", "mlp")

# Causal; beyond these lengths a peer has the T x S array in memory.
_LONGEST = {"jax_xla": 4096, "xla": 16_384}


def measure(
    *,
    peers: Sequence[str] | None = None,
    cases: Sequence[shapes.Shape] | None = None,
    ops: Sequence[str] = OPS,
    op_sizes: memory_gpu.Sizes | None = None,
    sparse_length: int = 32_768,
    matmul_size: int = 8192,
    copy_bytes: int = 2**30,
    error_length: int = 1000,
    num_times: int = 7,
    calls_per_sync: int = _CALLS_PER_SYNC,
    rotated_bytes: int = _ROTATED_BYTES,
    max_seconds: float = 540.0,
) -> Iterator[harness.Row]:
  """Measures everything, row by row; see the module's docstring.

  Args:
    peers: Names of `peers.forward_peers`, None for all.
    cases: Shapes of causal attention, None for `default_cases`.
    ops: Which of `OPS`; linear attention goes with attention.
    op_sizes: Of decode, gathered MLPs and linear attention, None for the
      default of `memory_gpu.Sizes`.
    sparse_length: T of block-sparse attention, a multiple of 256.
    matmul_size: Side of the square matrices.
    copy_bytes: Size of the array that is copied.
    error_length: T of the comparison with float64; ragged by default.
    num_times: Times of which the median is taken.
    calls_per_sync: At least so many calls a time.
    rotated_bytes: Size of the inputs that are gone through.
    max_seconds: Rows after that are left out, and say so.
  """
  deadline = time.monotonic() + max_seconds
  timer = functools.partial(
      gpu_rows.time_calls,
      num_times=num_times,
      calls_per_sync=calls_per_sync,
      rotated_bytes=rotated_bytes,
  )
  cases = default_cases() if cases is None else cases
  op_sizes = op_sizes or memory_gpu.Sizes()
  jobs = [
      _ceilings(timer, matmul_size, copy_bytes),
      memory_gpu.error_jobs(op_sizes, ops),
  ]
  if "decode" in ops:
    jobs.append(memory_gpu.decode_jobs(timer, op_sizes))
  if "mlp" in ops:
    jobs.append(memory_gpu.mlp_jobs(timer, op_sizes))
  if "attention" in ops:
    jobs += [
        memory_gpu.linear_jobs(timer, op_sizes),
        _errors(peers, error_length),
        _dense(timer, peers, cases),
        _sparse(timer, peers, sparse_length),
    ]
  return gpu_rows.rows_of(itertools.chain(*jobs), deadline)


def default_cases() -> list[shapes.Shape]:
  """Lengths 1k to 64k, heads of 64 and 128, groups of 1, 4 and 8 heads."""
  make = lambda length, num_kv_heads, head_dim: dataclasses.replace(
      shapes.square(length, 16, num_kv_heads, head_dim),
      batch=max(_TOKENS // length, 1),
  )
  lengths = (4096, 16_384, 1024, 65_536)
  cases = [make(length, 4, dim) for dim in (128, 64) for length in lengths]
  return [*cases, make(16_384, 16, 128), make(16_384, 2, 128)]


_PASSES = {"forward": lambda call: call, "gradients": peers_lib.gradient_of}


def _ceilings(
    timer: gpu_rows.Timer, size: int, num_bytes: int
) -> Iterator[gpu_rows.Job]:
  """What the chip can do, to which the rest is compared."""
  matrices = lambda seed: (
      peers_lib.normal(2 * seed, (size, size)),
      peers_lib.normal(2 * seed + 1, (size, size)),
  )
  multiply = lambda a, b: a @ b
  product = gpu_rows.timed(timer, multiply, matrices, work=(2 * size**3, 0))
  yield gpu_rows.Job("ceiling", "jax", f"bfloat16 {size}^3", product)
  numbers = lambda seed: (peers_lib.normal(seed, (num_bytes // 2,)),)
  copy = gpu_rows.timed(
      timer, lambda x: x + 1, numbers, work=(0, 2 * num_bytes)
  )
  size_text = f"{num_bytes / 2**20:.3g} MiB"
  yield gpu_rows.Job("ceiling", "jax", f"copy of {size_text}", copy)


def _errors(peers: Sequence[str] | None, length: int) -> Iterator[gpu_rows.Job]:
  """Distance to float64, of all outputs and gradients."""
  for head_dim in (64, 128):
    shape = shapes.square(length, 4, 2, head_dim)
    arguments = functools.partial(peers_lib.inputs, shape, jnp.bfloat16, 0)
    exact = functools.partial(api.attention, implementation="reference")
    known = peers_lib.forward_peers(masks.causal(length))
    del known["jax_mosaic"]  # float16, and lengths that are multiples of 128.
    for name in _chosen(peers, known):
      expected = functools.partial(
          exact,
          where=masks.causal(length),
          return_col_mass=name.endswith("+col_mass"),
      )
      expected = functools.partial(peers_lib.arrays_of, expected)
      for what, run in _PASSES.items():
        yield gpu_rows.Job(
            f"error of {what}",
            name,
            f"T={length} N=4 K=2 H={head_dim} causal",
            functools.partial(
                peers_lib.relative_error,
                run(known[name]),
                run(expected),
                arguments,
            ),
        )
  if peers is None or "pallas_gpu" in peers:
    yield from _errors_of_variants(length)


def _errors_of_variants(length: int) -> Iterator[gpu_rows.Job]:
  """The same for all that our kernels can do beside a causal mask."""
  ids = np.arange(length) % 5
  near = masks.streaming(length, window=max(length // 5, 1), num_sinks=4)
  capped = {"where": near, "logits_soft_cap": 3.0}
  sink_logits = jnp.linspace(-1.0, 1.0, 4)
  selection = programs.random_selection(length, 4, 128, 128, density=0.3)
  variants: dict[str, dict[str, Any]] = {
      "no mask": {},
      "two spans, soft cap, sinks": dict(capped, sink_logits=sink_logits),
      "two spans, ids": {"where": near & masks.hash_sparse(ids, ids)},
      "selection": {"where": selection},
  }
  for (name, options), head_dim in itertools.product(
      variants.items(), (64, 128)
  ):
    shape = shapes.square(length, 4, 1, head_dim)
    arguments = functools.partial(peers_lib.inputs, shape, jnp.bfloat16, 0)
    call = functools.partial(
        api.attention, return_lse=True, return_col_mass=True, **options
    )
    ours, exact = (
        functools.partial(
            peers_lib.arrays_of, call, implementation=implementation
        )
        for implementation in ("pallas_gpu", "reference")
    )
    for what, run in _PASSES.items():
      yield gpu_rows.Job(
          f"error of {what}",
          "pallas_gpu",
          f"T={length} N=4 K=1 H={head_dim} {name}",
          functools.partial(
              peers_lib.relative_error, run(ours), run(exact), arguments
          ),
      )


def _dense(
    timer: gpu_rows.Timer,
    peers: Sequence[str] | None,
    cases: Sequence[shapes.Shape],
) -> Iterator[gpu_rows.Job]:
  """Times of causal attention, then of its training step."""
  for what, shape in itertools.product(_PASSES, cases):
    mask = masks.causal(shape.num_queries)
    known = peers_lib.forward_peers(mask)
    case = (
        f"B={shape.batch} T={shape.num_queries} N={shape.num_heads}"
        f" K={shape.num_kv_heads} H={shape.head_dim} causal"
    )
    work = _work(what, shape, cost.num_pairs(mask, shape))
    for name in _chosen(peers, known):
      if shape.num_queries > _LONGEST.get(name, shape.num_queries):
        continue
      # Column sums are a measurement: without gradient, they are not computed.
      if what != "forward" and "col_mass" in name:
        continue
      make = functools.partial(
          peers_lib.inputs, shape, peers_lib.dtype_of(name)
      )
      run = gpu_rows.timed(timer, _PASSES[what](known[name]), make, work=work)
      yield gpu_rows.Job(what, name, case, run)


def _sparse(
    timer: gpu_rows.Timer, peers: Sequence[str] | None, length: int
) -> Iterator[gpu_rows.Job]:
  """A tenth of the causal blocks, drawn per head."""
  shape = shapes.square(length, 16, 4)
  block = min(256, length)
  selection = programs.random_selection(
      length, shape.num_heads, block, block, density=0.1
  )
  listed = int(np.asarray(selection.num_valid).sum())
  # The work's shape counts each pair once a head.
  pairs = listed * block * block // shape.num_heads
  for what, name in itertools.product(
      _PASSES, _chosen(peers, ("pallas_gpu", "xla"))
  ):
    call = functools.partial(
        peers_lib.arrays_of,
        api.attention,
        where=selection,
        implementation=name,
    )
    run = gpu_rows.timed(
        timer,
        _PASSES[what](call),
        functools.partial(peers_lib.inputs, shape, jnp.bfloat16),
        work=_work(what, shape, pairs),
    )
    case = f"T={length} N=16 K=4 H=128, {listed} blocks of {block}"
    yield gpu_rows.Job(f"block-sparse {what}", name, case, run)


def _work(what: str, shape: shapes.Shape, pairs: int) -> tuple[int, int]:
  """FLOPs and bytes of a pass."""
  flops, num_bytes = 0, 0
  passes = (cost.forward, cost.backward)
  for work in passes if what == "gradients" else passes[:1]:
    done = work(shape, pairs)
    flops, num_bytes = flops + done.flops, num_bytes + done.bytes_accessed
  return flops, num_bytes


def _chosen(peers: Sequence[str] | None, known: Iterable[str]) -> list[str]:
  return [name for name in known if peers is None or name in peers]


def report(ops: Sequence[str] = OPS) -> list[harness.Row]:
  """Prints each row of `measure` when it is known; returns the rows.

  Args:
    ops: Which of `OPS`.

  Raises:
    ValueError: If there is no GPU.
  """
  if jax.default_backend() != "gpu":
    raise ValueError(
        f"--target=gpu measures on a GPU; jax has {jax.devices()[0].platform}"
        " devices here. --target=h100 compiles without one"
    )
  print(gpu_rows.table(()), flush=True)
  rows = []
  for row in measure(ops=ops):
    print(gpu_rows.table([row]).splitlines()[-1], flush=True)
    rows.append(row)
  return rows
