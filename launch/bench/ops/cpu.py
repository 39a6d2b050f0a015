"""Measures the XLA attention ops on this machine's CPU beside jax's own.

  python -m launch.bench.kernels --target=cpu

prints peak memory of long sequences first, each in a fresh process, then times.
Programs that are compared run in one process on the same inputs, in turns, so
that what else the machine does falsifies both alike; times are medians and
quartiles of 20 or more calls, and the ratio of the shortest is printed too. The
peer is `jax.nn.dot_product_attention(implementation="xla")`, which has the
T x S array in memory. Some minutes on two idle cores.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import api
from kernels_pallas.attention import cost
from kernels_pallas.attention import shapes
from kernels_pallas.gather_mlp import api as gather_api
from kernels_pallas.gather_mlp import shapes as gather_shapes
from kernels_pallas.gather_mlp import xla as gather_xla
from kernels_pallas.linear_attention import api as linear_api
from launch import app
from launch.bench.ops import decode_cpu

# Whoever imports this module for its functions gets no flags.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_CHILD = flags.DEFINE_string(
    "child", None, "Internal: program whose memory to measure.", _FLAGS
)
_CHILD_LENGTH = flags.DEFINE_integer(
    "child_length", 0, "Internal: its sequence length.", flag_values=_FLAGS
)

OPS = ("attention", "mlp", "decode")
LENGTHS = (512, 1024, 2048, 4096)
_HEADS = (8, 8), (8, 2)  # Query and key heads.
_HEAD_DIM = 64
_MEMORY_LENGTH = 16_384
_COMPILED_LENGTHS = 32_768, 65_536, 131_072
_SPARSE_LENGTH = 8192
_LINEAR_LENGTHS = 1024, 4096
_MLP_DENSITY = 0.1

Row = dict[str, Any]


def main(_: list[str]) -> None:
  """Measures and prints; or one program's memory, for the parent process."""
  if _CHILD.value:
    print(json.dumps(_peak_memory(_CHILD.value, _CHILD_LENGTH.value)))
    return
  report()


def report(ops: Sequence[str] = OPS) -> list[Row]:
  """Makes and prints the rows of some of `OPS`."""
  rows = []
  if "attention" in ops:
    # A process starts from the peak of its parent, which is small as yet.
    rows += [
        *memory_rows(_MEMORY_LENGTH, tell=_print),
        *compiled_rows(_COMPILED_LENGTHS, tell=_print),
        *measure(LENGTHS, tell=_print),
        sparse_row(_SPARSE_LENGTH, tell=_print),
        *(linear_row(n, tell=_print) for n in _LINEAR_LENGTHS),
    ]
  if "mlp" in ops:
    rows += [mlp_row(x, tell=_print) for x in ("opt_6.7b", "llama3_8b")]
  if "decode" in ops:
    rows.append(decode_cpu.decode_row(tell=_print))
  return rows


def measure(
    lengths: Sequence[int],
    *,
    heads: Sequence[tuple[int, int]] = _HEADS,
    num_times: int = 20,
    tell: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
  """Times forward, forward with column sums, and gradients beside the peer.

  Args:
    lengths: T = S of one sequence.
    heads: Query and key heads.
    num_times: Calls of each program, 4 times as many up to T = 512.
    tell: Is given each row as soon as it is known.

  Returns:
    Rows; `ratio` is our median time by the peer's, `ratio_of_least` that of the
    shortest, `difference` the largest between results.
  """
  rows = []
  for length in lengths:
    for num_heads, num_kv_heads in heads:
      for mask_name in ("causal", "full"):
        shape = shapes.square(length, num_heads, num_kv_heads, _HEAD_DIM)
        for row in _time_shape(shape, mask_name == "causal", num_times):
          tell(row)
          rows.append(row)
  return rows


def sparse_row(
    length: int,
    *,
    block_q: int = 256,
    block_kv: int = 128,
    num_times: int = 20,
    tell: Callable[[Row], None] = lambda row: None,
) -> Row:
  """Times block-sparse attention beside our dense one, both causal.

  Args:
    length: T = S.
    block_q: Queries in a block.
    block_kv: Keys in a block.
    num_times: Calls of each program.
    tell: Is given the row.
  """
  shape = shapes.square(length, 8, 8, _HEAD_DIM)
  mask = masks.causal(length)
  mass = jax.random.uniform(jax.random.key(1), (1, 8, length))
  chosen = selection_lib.heavy_hitters(
      mass,
      mask,
      num_queries=length,
      num_heavy=1,
      block_q=block_q,
      block_kv=block_kv,
  )
  ours = lambda query, key, value: api.attention(
      query, key, value, where=chosen, implementation="xla"
  )
  dense = lambda *arrays: api.attention(
      *arrays, where=mask, implementation="xla"
  )
  times = time_in_turns(
      {"ours": jax.jit(ours), "peer": jax.jit(dense)}, _draw(shape), num_times
  )
  density = cost.density(jax.tree.map(np.asarray, chosen), shape, mask)
  row = _row(f"block-sparse, {density:.0%} of the pairs", shape, True, times)
  tell(row)
  return row


def linear_row(
    length: int,
    *,
    num_times: int = 20,
    tell: Callable[[Row], None] = lambda row: None,
) -> Row:
  """Times causal linear attention beside our dense causal attention.

  Args:
    length: T.
    num_times: Calls of each program.
    tell: Is given the row.
  """
  shape = shapes.square(length, 8, 8, _HEAD_DIM)
  ours = lambda *arrays: linear_api.linear_attention(
      *arrays, decay=jnp.full(8, 0.99), implementation="xla"
  )
  dense = lambda *arrays: api.attention(
      *arrays, where=masks.causal(length), implementation="xla"
  )
  calls = {"ours": jax.jit(ours), "peer": jax.jit(dense)}
  times = time_in_turns(calls, _draw(shape), num_times)
  row = _row("linear attention, by dense", shape, True, times)
  tell(row)
  return row


def mlp_row(
    name: str,
    *,
    density: float = _MLP_DENSITY,
    num_times: int = 20,
    tell: Callable[[Row], None] = lambda row: None,
) -> Row:
  """Times a gathered MLP beside the dense one, float32.

  Args:
    name: Of a shape in `gather_mlp.shapes.BENCHMARKS`.
    density: Share of the blocks, rounded.
    num_times: Calls of each program.
    tell: Is given the row.
  """
  shape = gather_shapes.BENCHMARKS[name]
  abstract, treedef = jax.tree.flatten(shape.arrays("float32"))
  keys = jax.random.split(jax.random.key(0), len(abstract))
  leaves = [
      0.02 * jax.random.normal(key, x.shape)
      for key, x in zip(keys, abstract, strict=True)
  ]
  x, weights = jax.tree.unflatten(treedef, leaves)
  order = np.random.default_rng(0).permutation(shape.num_blocks)
  chosen = jnp.asarray(np.sort(order[: round(density * shape.num_blocks)]))
  activation = "silu" if shape.is_gated else "relu"

  def ours(x, weights, chosen):
    given = {k: v for k, v in weights._asdict().items() if v is not None}
    return gather_api.gather_mlp(
        x,
        **given,
        block_ids=chosen,
        activation=activation,
        block_size=shape.block_size,
        implementation="xla",
    )

  def dense(x, weights, _):
    return gather_xla.dense(x, weights, activation)

  calls = {"ours": jax.jit(ours), "peer": jax.jit(dense)}
  times = time_in_turns(calls, (x, weights, chosen), num_times)
  row = {"what": f"gather MLP at {density:.0%}, by dense", "shape": name}
  row |= {"batch": shape.batch} | _times(times)
  tell(row)
  return row


def memory_rows(
    length: int, tell: Callable[[Row], None] = lambda row: None
) -> list[Row]:
  """Peak memory of fresh processes that attend causally, in 1e9 bytes."""
  rows = []
  for program in _PROGRAMS:
    arguments = [f"--child={program}", f"--child_length={length}"]
    finished = subprocess.run(
        [sys.executable, "-m", "launch.bench.ops.cpu", *arguments],
        cwd=pathlib.Path(__file__).parents[3],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    row = json.loads(finished.stdout.splitlines()[-1])
    tell(row)
    rows.append(row)
  return rows


def compiled_rows(
    lengths: Sequence[int], tell: Callable[[Row], None] = lambda row: None
) -> list[Row]:
  """Bytes of intermediate arrays of one head's programs, not run."""
  rows = []
  for length in lengths:
    shape = shapes.square(length, 1, 1, _HEAD_DIM)
    for name, make in _PROGRAMS.items():
      lowered = jax.jit(make(length)).lower(*_abstract(shape, name))
      memory = lowered.compile().memory_analysis()
      assert memory is not None, "XLA for CPUs tells"
      row = {
          "what": f"{name}, compiled",
          "length": length,
          "temp_mb": memory.temp_size_in_bytes / 1e6,
          "one_byte_a_pair_mb": length**2 / 1e6,
      }
      tell(row)
      rows.append(row)
  return rows


def time_in_turns(
    calls: Mapping[str, Callable[..., Any]],
    arrays: Sequence[Any],
    num_times: int,
) -> dict[str, np.ndarray]:
  """Seconds of each call, A B A B, after two that do not count."""
  seconds = {name: [] for name in calls}
  for turn in range(num_times + 2):
    for name, call in calls.items():
      started = time.perf_counter()
      jax.block_until_ready(call(*arrays))
      if turn > 1:
        seconds[name].append(time.perf_counter() - started)
  return {name: np.asarray(found) for name, found in seconds.items()}


def _time_shape(
    shape: shapes.Shape, is_causal: bool, num_times: int
) -> list[Row]:
  mask = masks.causal(shape.num_queries) if is_causal else None
  num_times *= 4 if shape.num_queries <= 512 else 1

  def peer(query, key, value):
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=is_causal, implementation="xla"
    )

  def ours(*arrays):
    return api.attention(*arrays, where=mask, implementation="xla").out

  def with_mass(*arrays):
    return api.attention(
        *arrays, where=mask, return_col_mass=True, implementation="xla"
    )

  arrays = _draw(shape)
  calls = {
      "peer": jax.jit(peer),
      "ours": jax.jit(ours),
      "mass": jax.jit(with_mass),
  }
  times = time_in_turns(calls, arrays, num_times)
  mass = {"peer": times["peer"], "ours": times["mass"]}
  gradients = {"peer": _gradients(peer), "ours": _gradients(ours)}
  d_out = jax.random.normal(jax.random.key(9), arrays[0].shape)
  backward = time_in_turns(gradients, (*arrays, d_out), num_times)
  difference = jnp.abs(calls["peer"](*arrays) - calls["ours"](*arrays)).max()
  rows = [
      _row(name, shape, is_causal, found)
      for name, found in (
          ("forward", times),
          ("forward + col_mass", mass),
          ("forward + backward", backward),
      )
  ]
  rows[0]["difference"] = float(difference)
  return rows


def _gradients(call: Callable[..., Any]) -> Callable[..., Any]:
  return jax.jit(
      lambda query, key, value, d_out: jax.vjp(call, query, key, value)[1](
          d_out
      )
  )


def _causal_mass(length: int) -> Callable[..., Any]:
  return lambda *arrays: api.attention(
      *arrays,
      where=masks.causal(length),
      return_col_mass=True,
      implementation="xla",
  )


def _causal_gradients(length: int) -> Callable[..., Any]:
  return _gradients(lambda *arrays: _causal_mass(length)(*arrays).out)


_PROGRAMS = {
    "forward + col_mass": _causal_mass,
    "forward + backward": _causal_gradients,
}


def _peak_memory(program: str, length: int) -> Row:
  """Runs a program in this process, which has done nothing else."""
  shape = shapes.square(length, 8, 8, _HEAD_DIM)
  arrays = _draw(shape)
  if program == "forward + backward":
    arrays = (*arrays, jnp.ones_like(arrays[0]))
  before = _peak_rss_gb()
  jax.block_until_ready(jax.jit(_PROGRAMS[program](length))(*arrays))
  return {
      "what": f"{program}, memory",
      "length": length,
      "heads": 8,
      "peak_rss_gb": _peak_rss_gb(),
      "before_gb": before,
  }


def _peak_rss_gb() -> float:
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _abstract(shape: shapes.Shape, program: str) -> tuple[Any, ...]:
  arrays = shape.arrays("float32")
  return (*arrays, arrays[0]) if program == "forward + backward" else arrays


def _draw(shape: shapes.Shape) -> tuple[jax.Array, ...]:
  keys = jax.random.split(jax.random.key(0), 3)
  return tuple(
      jax.random.normal(key, array.shape)
      for key, array in zip(keys, shape.arrays("float32"), strict=True)
  )


def _row(
    what: str,
    shape: shapes.Shape,
    is_causal: bool,
    times: dict[str, np.ndarray],
) -> Row:
  row = {
      "what": what,
      "length": shape.num_queries,
      "heads": f"{shape.num_heads}/{shape.num_kv_heads}",
      "mask": "causal" if is_causal else "full",
  }
  return row | _times(times)


def _times(times: dict[str, np.ndarray]) -> Row:
  """Medians, quartiles and ratios; the machine's load."""
  row: Row = {}
  for name in ("ours", "peer"):
    low, median, high = 1e3 * np.quantile(times[name], (0.25, 0.5, 0.75))
    row |= {f"{name}_ms": float(median), f"{name}_iqr_ms": float(high - low)}
  ours, peer = times["ours"], times["peer"]
  return row | {
      "ratio": float(np.median(ours) / np.median(peer)),
      "ratio_of_least": float(ours.min() / peer.min()),
      "num_times": len(ours),
      "load_1min": os.getloadavg()[0],
  }


def _print(row: Row) -> None:
  show = lambda x: f"{x:.3g}" if isinstance(x, float) else str(x)
  print(
      "  ".join(f"{name}={show(value)}" for name, value in row.items()),
      flush=True,
  )


if __name__ == "__main__":
  app.run(main)
