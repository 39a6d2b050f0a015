"""Measures the GPU attention kernels beside cuDNN, XLA and jax's own kernel.

  python -m launch.bench_kernels --target=gpu

needs a Hopper GPU and jax >= 0.11.2, and ends within ten minutes: what the chip
can do first (a product of matrices, a copy), then how far results are from
float64, then times. Each row is printed when it is known, and a row that fails
says why and costs no other. Not run yet: there is no GPU where it was written.

A time is that of one call, from programs of several calls on different random
inputs, together larger than the GPU's cache, with 50 calls or more between two
synchronisations; median and quartiles of several such times.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import functools
import itertools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks
from kernels_pallas.block_sparse_attention import api as block_sparse
from kernels_pallas.flash_attention import api
from kernels_pallas.flash_attention import cost
from kernels_pallas.flash_attention import shapes
from launch import kernel_peers as peers_lib
from launch import kernel_programs

# Twice the second-level cache of an H100 or H200.
_ROTATED_BYTES = 2 * 50 * 2**20
_CALLS_PER_SYNC = 50
_TOKENS = 16_384

# Causal; beyond these lengths a peer has the T x S array in memory.
_LONGEST = {"jax_xla": 4096, "xla": 16_384}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One line of the table.

  Attributes:
    what: What is computed.
    peer: By whom.
    case: Shape and mask.
    median_ms: Of a call.
    quartiles_ms: Lower and upper.
    tflops: Needed FLOPs, those of allowed pairs, by time.
    gb_per_s: Bytes that must be moved, by time.
    error: Norm of the difference to float64 by the norm, in the errors' rows.
    note: Why there is no figure.
  """

  what: str
  peer: str
  case: str
  median_ms: float | None = None
  quartiles_ms: tuple[float, float] | None = None
  tflops: float | None = None
  gb_per_s: float | None = None
  error: float | None = None
  note: str = ""


def measure(
    *,
    peers: Sequence[str] | None = None,
    cases: Sequence[shapes.Shape] | None = None,
    sparse_length: int = 32_768,
    matmul_size: int = 8192,
    copy_bytes: int = 2**30,
    error_length: int = 1000,
    num_times: int = 7,
    calls_per_sync: int = _CALLS_PER_SYNC,
    rotated_bytes: int = _ROTATED_BYTES,
    max_seconds: float = 540.0,
    tell: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
  """Measures everything; see the module's docstring.

  Args:
    peers: Names of `kernel_peers.forward_peers`, None for all.
    cases: Shapes of causal attention, None for `default_cases`.
    sparse_length: T of block-sparse attention, a multiple of 256.
    matmul_size: Side of the square matrices.
    copy_bytes: Size of the array that is copied.
    error_length: T of the comparison with float64; ragged by default.
    num_times: Times of which the median is taken.
    calls_per_sync: At least so many calls a time.
    rotated_bytes: Size of the inputs that are gone through.
    max_seconds: Rows after that are left out, and say so.
    tell: Is given each row as soon as it is known.
  """
  deadline = time.monotonic() + max_seconds
  timer = functools.partial(
      time_calls,
      num_times=num_times,
      calls_per_sync=calls_per_sync,
      rotated_bytes=rotated_bytes,
  )
  cases = default_cases() if cases is None else cases
  jobs = itertools.chain(
      _ceilings(timer, matmul_size, copy_bytes),
      _errors(peers, error_length),
      _dense(timer, peers, cases),
      _sparse(timer, peers, sparse_length),
  )
  rows = []
  for job in jobs:
    rows.append(_row_of(job, deadline))
    tell(rows[-1])
  return rows


def table(rows: Iterable[Row]) -> str:
  """Formats rows as a Markdown table."""
  lines = [
      "| what | by | case | ms (quartiles) | TFLOP/s | GB/s | error | note |",
      "| --- | --- | --- | --- | --- | --- | --- | --- |",
  ]
  for row in rows:
    text = lambda value, form: "" if value is None else format(value, form)
    times = text(row.median_ms, ".4g")
    if row.quartiles_ms is not None:
      times += " ({:.4g}, {:.4g})".format(*row.quartiles_ms)
    cells = (row.what, row.peer, row.case, times, text(row.tflops, ".1f"))
    cells += (text(row.gb_per_s, ".0f"), text(row.error, ".2e"), row.note)
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def default_cases() -> list[shapes.Shape]:
  """Lengths 1k to 64k, heads of 64 and 128, groups of 1, 4 and 8 heads."""
  make = lambda length, num_kv_heads, head_dim: dataclasses.replace(
      shapes.square(length, 16, num_kv_heads, head_dim),
      batch=max(_TOKENS // length, 1),
  )
  lengths = (4096, 16_384, 1024, 65_536)
  cases = [make(length, 4, dim) for dim in (128, 64) for length in lengths]
  return [*cases, make(16_384, 16, 128), make(16_384, 2, 128)]


def time_calls(
    fn: Callable[..., Any],
    make: Callable[[int], Any],
    *,
    num_times: int,
    calls_per_sync: int,
    rotated_bytes: int,
) -> tuple[float, tuple[float, float]]:
  """Times `fn(*make(seed))`: median and quartiles, in seconds a call."""
  one = jax.block_until_ready(make(0))
  num_bytes = sum(x.nbytes for x in jax.tree.leaves(one))
  # At most 16 calls in a program, and 4 GiB of inputs.
  most = max(min(16, 2**32 // num_bytes), 2)
  num_sets = min(max(math.ceil(rotated_bytes / num_bytes), 4), most)
  sets = [one, *(make(seed) for seed in range(1, num_sets))]
  program = jax.jit(lambda sets: [fn(*arguments) for arguments in sets])
  jax.block_until_ready(program(sets))
  repeats = math.ceil(calls_per_sync / num_sets)
  times = []
  for _ in range(num_times):
    start = time.perf_counter()
    result = None
    for _ in range(repeats):
      result = program(sets)
    jax.block_until_ready(result)
    times.append((time.perf_counter() - start) / (repeats * num_sets))
  lower, median, upper = np.percentile(times, (25, 50, 75))
  return float(median), (float(lower), float(upper))


_PASSES = {"forward": lambda call: call, "gradients": peers_lib.gradient_of}


@dataclasses.dataclass(frozen=True)
class _Job:
  """A row to be made: `run` returns its figures."""

  what: str
  peer: str
  case: str
  run: Callable[[], dict[str, Any]]


def _row_of(job: _Job, deadline: float) -> Row:
  """The row of a job, or one that says why there is none."""
  row = Row(what=job.what, peer=job.peer, case=job.case)
  if time.monotonic() > deadline:
    return dataclasses.replace(row, note="not measured: no time left")
  try:
    return dataclasses.replace(row, **job.run())
  except Exception as error:  # Whatever a peer raises costs its row alone.
    lines = str(error).strip().splitlines() or [""]
    note = f"{type(error).__name__}: {lines[0][:200]}"
    return dataclasses.replace(row, note=note)


def _timing(
    timer: Callable[..., Any],
    call: Callable[..., Any],
    make: Callable[[int], Any],
    flops: float,
    num_bytes: float,
) -> dict[str, Any]:
  """Figures of a time."""
  median, (lower, upper) = timer(call, make)
  return {
      "median_ms": 1e3 * median,
      "quartiles_ms": (1e3 * lower, 1e3 * upper),
      "tflops": flops / median / 1e12 if flops else None,
      "gb_per_s": num_bytes / median / 1e9 if num_bytes else None,
  }


def _ceilings(
    timer: Callable[..., Any], size: int, num_bytes: int
) -> Iterator[_Job]:
  """What the chip can do, to which the rest is compared."""
  matrices = lambda seed: (
      peers_lib.normal(2 * seed, (size, size)),
      peers_lib.normal(2 * seed + 1, (size, size)),
  )
  product = functools.partial(
      _timing, timer, lambda a, b: a @ b, matrices, 2 * size**3, 0
  )
  yield _Job("ceiling", "jax", f"bfloat16 {size}^3", product)
  numbers = lambda seed: (peers_lib.normal(seed, (num_bytes // 2,)),)
  copy = functools.partial(
      _timing, timer, lambda x: x + 1, numbers, 0, 2 * num_bytes
  )
  yield _Job("ceiling", "jax", f"copy of {num_bytes / 2**20:.3g} MiB", copy)


def _errors(peers: Sequence[str] | None, length: int) -> Iterator[_Job]:
  """Distance to float64, of all outputs and gradients."""
  for head_dim in (64, 128):
    shape = shapes.square(length, 4, 2, head_dim)
    arguments = functools.partial(peers_lib.inputs, shape, jnp.bfloat16, 0)
    exact = functools.partial(api.flash_attention, implementation="reference")
    known = peers_lib.forward_peers(masks.causal(length))
    del known["jax_mosaic"]  # float16, and lengths that are multiples of 128.
    for name in _chosen(peers, known):
      expected = functools.partial(
          exact,
          mask=masks.causal(length),
          return_col_mass=name.endswith("+col_mass"),
      )
      expected = functools.partial(peers_lib.arrays_of, expected)
      for what, run in _PASSES.items():
        yield _Job(
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


def _errors_of_variants(length: int) -> Iterator[_Job]:
  """The same for all that our kernels can do beside a causal mask."""
  ids = np.arange(length) % 5
  near = masks.streaming(length, window=max(length // 5, 1), num_sinks=4)
  capped = {"mask": near, "logits_soft_cap": 3.0}
  sink_logits = jnp.linspace(-1.0, 1.0, 4)
  selection = kernel_programs.random_selection(length, 4, 128, 128, density=0.3)
  variants = {
      "no mask": (api.flash_attention, {}),
      "two spans, soft cap, sinks": (
          api.flash_attention,
          capped | {"sink_logits": sink_logits},
      ),
      "two spans, ids": (
          api.flash_attention,
          {"mask": near & masks.hash_sparse(ids, ids)},
      ),
      "selection": (
          block_sparse.block_sparse_attention,
          {"selection": selection},
      ),
  }
  for (name, (op, options)), head_dim in itertools.product(
      variants.items(), (64, 128)
  ):
    shape = shapes.square(length, 4, 1, head_dim)
    arguments = functools.partial(peers_lib.inputs, shape, jnp.bfloat16, 0)
    call: Any = functools.partial(
        op, return_lse=True, return_col_mass=True, **options
    )
    ours, exact = (
        functools.partial(
            peers_lib.arrays_of, call, implementation=implementation
        )
        for implementation in ("pallas_gpu", "reference")
    )
    for what, run in _PASSES.items():
      yield _Job(
          f"error of {what}",
          "pallas_gpu",
          f"T={length} N=4 K=1 H={head_dim} {name}",
          functools.partial(
              peers_lib.relative_error, run(ours), run(exact), arguments
          ),
      )


def _dense(
    timer: Callable[..., Any],
    peers: Sequence[str] | None,
    cases: Sequence[shapes.Shape],
) -> Iterator[_Job]:
  """Times of causal attention, then of its training step."""
  for what, shape in itertools.product(_PASSES, cases):
    mask = masks.causal(shape.num_queries)
    known = peers_lib.forward_peers(mask)
    case = (
        f"B={shape.batch} T={shape.num_queries} N={shape.num_heads}"
        f" K={shape.num_kv_heads} H={shape.head_dim} causal"
    )
    flops, num_bytes = _work(what, shape, cost.num_pairs(mask, shape))
    for name in _chosen(peers, known):
      if shape.num_queries > _LONGEST.get(name, shape.num_queries):
        continue
      # Column sums are a measurement: without gradient, they are not computed.
      if what != "forward" and "col_mass" in name:
        continue
      call = _PASSES[what](known[name])
      make = functools.partial(
          peers_lib.inputs, shape, peers_lib.dtype_of(name)
      )
      run = functools.partial(_timing, timer, call, make, flops, num_bytes)
      yield _Job(what, name, case, run)


def _sparse(
    timer: Callable[..., Any], peers: Sequence[str] | None, length: int
) -> Iterator[_Job]:
  """A tenth of the causal blocks, drawn per head."""
  shape = shapes.square(length, 16, 4)
  block = min(256, length)
  selection = kernel_programs.random_selection(
      length, shape.num_heads, block, block, density=0.1
  )
  listed = int(np.asarray(selection.num_valid).sum())
  # The work's shape counts each pair once a head.
  pairs = listed * block * block // shape.num_heads
  for what, name in itertools.product(
      _PASSES, _chosen(peers, ("pallas_gpu", "xla"))
  ):
    op: Any = block_sparse.block_sparse_attention
    call = functools.partial(
        peers_lib.arrays_of, op, selection=selection, implementation=name
    )
    run = functools.partial(
        _timing,
        timer,
        _PASSES[what](call),
        functools.partial(peers_lib.inputs, shape, jnp.bfloat16),
        *_work(what, shape, pairs),
    )
    case = f"T={length} N=16 K=4 H=128, {listed} blocks of {block}"
    yield _Job(f"block-sparse {what}", name, case, run)


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


def report() -> list[dict[str, Any]]:
  """Prints each row of `measure` when it is known; returns the rows.

  Raises:
    ValueError: If there is no GPU.
  """
  if jax.default_backend() != "gpu":
    raise ValueError(
        f"--target=gpu measures on a GPU; jax has {jax.devices()[0].platform}"
        " devices here. --target=h100 compiles without one"
    )
  print(table(()), flush=True)
  tell = lambda row: print(table([row]).splitlines()[-1], flush=True)
  return [dataclasses.asdict(row) for row in measure(tell=tell)]
