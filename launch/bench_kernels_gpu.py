"""Measures the GPU attention kernels beside cuDNN, XLA and jax's own kernel.

  python -m launch.bench_kernels_gpu

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
from kernels_pallas import selection as selection_lib
from kernels_pallas.block_sparse_attention import api as block_sparse
from kernels_pallas.flash_attention import api
from kernels_pallas.flash_attention import cost
from kernels_pallas.flash_attention import pallas_gpu
from kernels_pallas.flash_attention import shapes

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
    report: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
  """Measures everything; see the module's docstring.

  Args:
    peers: Names of `forward_peers`, None for all.
    cases: Shapes of causal attention, None for `default_cases`.
    sparse_length: T of block-sparse attention, a multiple of 256.
    matmul_size: Side of the square matrices.
    copy_bytes: Size of the array that is copied.
    error_length: T of the comparison with float64; ragged by default.
    num_times: Times of which the median is taken.
    calls_per_sync: At least so many calls a time.
    rotated_bytes: Size of the inputs that are gone through.
    max_seconds: Rows after that are left out, and say so.
    report: Is given each row as soon as it is known.
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
    report(rows[-1])
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


def forward_peers(mask: masks.Mask) -> dict[str, Callable[..., Any]]:
  """Causal attentions by name; functions of query, key and value.

  Those with "+col_mass" return column sums too. `mask` is the causal one.
  """
  ours = functools.partial(api.flash_attention, mask=mask)
  cudnn = pallas_gpu.Config(forward_by="cudnn")
  peers = {
      "pallas_gpu": functools.partial(ours, implementation="pallas_gpu"),
      "pallas_gpu+col_mass": functools.partial(
          ours, implementation="pallas_gpu", return_col_mass=True
      ),
      "cudnn+col_mass": functools.partial(
          ours, implementation="pallas_gpu", return_col_mass=True, config=cudnn
      ),
      "xla": functools.partial(ours, implementation="xla"),
  }
  by_jax = functools.partial(jax.nn.dot_product_attention, is_causal=True)
  return {
      "cudnn": functools.partial(by_jax, implementation="cudnn"),
      **{
          name: functools.partial(_arrays_of, call)
          for name, call in peers.items()
      },
      "jax_mosaic": _jax_mosaic,
      "jax_xla": functools.partial(by_jax, implementation="xla"),
  }


def gradient_of(attention: Callable[..., Any]) -> Callable[..., Any]:
  """What training computes of an attention: forward, and three gradients."""

  def loss(query, key, value):
    out = attention(query, key, value)
    out = out if isinstance(out, tuple) else (out,)
    dtype = jnp.promote_types(out[0].dtype, jnp.float32)
    # lse, where there is one, is second; what is after that has no gradient.
    finite = [jnp.where(jnp.isneginf(x), 0.0, x) for x in out[:2]]
    return sum((x.astype(dtype) ** 2).sum() for x in finite)

  return jax.grad(loss, argnums=(0, 1, 2))


_PASSES = {"forward": lambda call: call, "gradients": gradient_of}


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
      _normal(2 * seed, (size, size)),
      _normal(2 * seed + 1, (size, size)),
  )
  product = functools.partial(
      _timing, timer, lambda a, b: a @ b, matrices, 2 * size**3, 0
  )
  yield _Job("ceiling", "jax", f"bfloat16 {size}^3", product)
  numbers = lambda seed: (_normal(seed, (num_bytes // 2,)),)
  copy = functools.partial(
      _timing, timer, lambda x: x + 1, numbers, 0, 2 * num_bytes
  )
  yield _Job("ceiling", "jax", f"copy of {num_bytes / 2**20:.3g} MiB", copy)


def _errors(peers: Sequence[str] | None, length: int) -> Iterator[_Job]:
  """Distance to float64, of all outputs and gradients."""
  for head_dim in (64, 128):
    shape = shapes.square(length, 4, 2, head_dim)
    arguments = functools.partial(_inputs, shape, jnp.bfloat16, 0)
    exact = functools.partial(api.flash_attention, implementation="reference")
    known = forward_peers(masks.causal(length))
    del known["jax_mosaic"]  # float16, and lengths that are multiples of 128.
    for name in _chosen(peers, known):
      expected = functools.partial(
          exact,
          mask=masks.causal(length),
          return_col_mass=name.endswith("+col_mass"),
      )
      expected = functools.partial(_arrays_of, expected)
      for what, run in _PASSES.items():
        yield _Job(
            f"error of {what}",
            name,
            f"T={length} N=4 K=2 H={head_dim} causal",
            functools.partial(
                _error, run(known[name]), run(expected), arguments
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
  selection = random_selection(length, 4, 128, density=0.3)
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
    arguments = functools.partial(_inputs, shape, jnp.bfloat16, 0)
    call: Any = functools.partial(
        op, return_lse=True, return_col_mass=True, **options
    )
    ours, exact = (
        functools.partial(_arrays_of, call, implementation=implementation)
        for implementation in ("pallas_gpu", "reference")
    )
    for what, run in _PASSES.items():
      yield _Job(
          f"error of {what}",
          "pallas_gpu",
          f"T={length} N=4 K=1 H={head_dim} {name}",
          functools.partial(_error, run(ours), run(exact), arguments),
      )


def _error(
    call: Callable[..., Any],
    exact: Callable[..., Any],
    make: Callable[[], Any],
) -> dict[str, Any]:
  """The largest relative error, and in the note that of each output."""
  arguments = make()
  found = jax.tree.leaves(jax.jit(call)(*arguments))
  with jax.enable_x64(True):
    wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arguments]
    expected = [np.asarray(x) for x in jax.tree.leaves(jax.jit(exact)(*wide))]
  errors = []
  for x, y in zip(found, expected, strict=True):
    is_finite = np.isfinite(y)  # lse is -inf where there is no key.
    difference = np.where(is_finite, np.asarray(x, np.float64) - y, 0.0)
    norm = np.linalg.norm(np.where(is_finite, y, 0.0))
    errors.append(float(np.linalg.norm(difference) / norm))
  note = ", ".join(f"{error:.1e}" for error in errors)
  return {"error": max(errors), "note": note}


def _dense(
    timer: Callable[..., Any],
    peers: Sequence[str] | None,
    cases: Sequence[shapes.Shape],
) -> Iterator[_Job]:
  """Times of causal attention, then of its training step."""
  for what, shape in itertools.product(_PASSES, cases):
    mask = masks.causal(shape.num_queries)
    known = forward_peers(mask)
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
      make = functools.partial(_inputs, shape, _dtype_of(name))
      run = functools.partial(_timing, timer, call, make, flops, num_bytes)
      yield _Job(what, name, case, run)


def _sparse(
    timer: Callable[..., Any], peers: Sequence[str] | None, length: int
) -> Iterator[_Job]:
  """A tenth of the causal blocks, drawn per head."""
  shape = shapes.square(length, 16, 4)
  block = min(256, length)
  selection = random_selection(length, shape.num_heads, block, density=0.1)
  listed = int(np.asarray(selection.num_valid).sum())
  # The work's shape counts each pair once a head.
  pairs = listed * block * block // shape.num_heads
  for what, name in itertools.product(
      _PASSES, _chosen(peers, ("pallas_gpu", "xla"))
  ):
    op: Any = block_sparse.block_sparse_attention
    call = functools.partial(
        _arrays_of, op, selection=selection, implementation=name
    )
    run = functools.partial(
        _timing,
        timer,
        _PASSES[what](call),
        functools.partial(_inputs, shape, jnp.bfloat16),
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


def random_selection(
    length: int, num_heads: int, block: int, *, density: float
) -> selection_lib.Selection:
  """Some of the causal blocks of each row and head, its own always."""
  num_blocks = -(-length // block)
  rng = np.random.default_rng(0)
  width = max(int(density * num_blocks), 1)
  order = rng.random((1, num_heads, num_blocks, num_blocks))
  rows, columns = np.arange(num_blocks)[:, None], np.arange(num_blocks)
  order = np.where(columns == rows, -1.0, order)
  order = np.where(columns > rows, 2.0, order)
  table = np.argsort(order, axis=-1)[..., :width].astype(np.int32)
  share = np.ceil(density * (np.arange(num_blocks) + 1)).astype(np.int32)
  num_valid = np.broadcast_to(np.minimum(share, width), table.shape[:3])
  return selection_lib.Selection(
      table, np.ascontiguousarray(num_valid), masks.causal(length), block, block
  )


def _chosen(peers: Sequence[str] | None, known: Iterable[str]) -> list[str]:
  return [name for name in known if peers is None or name in peers]


def _dtype_of(peer: str) -> Any:
  """The type of the inputs: jax's own kernel has float16 alone."""
  return jnp.float16 if peer == "jax_mosaic" else jnp.bfloat16


def _inputs(shape: shapes.Shape, dtype: Any, seed: int) -> tuple[Any, ...]:
  return tuple(
      _normal(3 * seed + i, array.shape, dtype)
      for i, array in enumerate(shape.arrays())
  )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(
    seed: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16
) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def _arrays_of(
    call: Callable[..., Any], *arguments: Any, **options: Any
) -> tuple[Any, ...]:
  """Out, and of lse and column sums what there is."""
  return tuple(x for x in call(*arguments, **options) if x is not None)


def _jax_mosaic(query: Any, key: Any, value: Any) -> Any:
  """Hopper attention as shipped with jax: no scale, and no causal backward."""
  from jax.experimental.pallas.ops.gpu import attention_mgpu

  config = attention_mgpu.TuningConfig(
      block_q=64, block_kv=128, max_concurrent_steps=2, causal=True
  )
  scale = np.asarray(query.shape[-1] ** -0.5, query.dtype)
  return attention_mgpu.attention(query * scale, key, value, config)


if __name__ == "__main__":
  print(table(()), flush=True)
  measure(report=lambda row: print(table([row]).splitlines()[-1], flush=True))
