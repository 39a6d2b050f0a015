"""Measures the XLA ops on this machine's CPU beside jax's own attention.

The part of `launch.bench.kernels` for --target=cpu: peak memory of long
sequences first, each in a fresh process, then times. Programs that are compared
take turns on the same inputs, see `launch.bench.harness`; times are medians and
quartiles of 20 or more calls, and the ratio of the shortest is printed too. The
peer is `jax.nn.dot_product_attention(implementation="xla")`, which has the
T x S array in memory. Some minutes on two idle cores.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import itertools
import json
import os
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import api
from kernels_pallas.attention import cost
from kernels_pallas.attention import shapes
from kernels_pallas.gather_mlp import api as gather_api
from kernels_pallas.gather_mlp import parts
from kernels_pallas.gather_mlp import shapes as gather_shapes
from kernels_pallas.gather_mlp import xla as gather_xla
from kernels_pallas.linear_attention import api as linear_api
from launch.bench import harness
from launch.bench.around import single_queries
from launch.bench.ops import decode_cpu
from launch.bench.ops import programs

OPS = ("attention", "mlp", "decode", "single")
LENGTHS = (512, 1024, 2048, 4096)
_HEADS = (8, 8), (8, 2)  # Query and key heads.
_HEAD_DIM = 64
_MEMORY_LENGTH = 16_384
_COMPILED_LENGTHS = 32_768, 65_536, 131_072
_SPARSE_LENGTH = 8192
_LINEAR_LENGTHS = 1024, 4096
_MLP_DENSITY = 0.1
_MLPS = ("opt_6.7b", "llama3_8b")


def _causal_mass(length: int) -> Callable[..., Any]:
  return functools.partial(
      api.attention,
      where=masks.causal(length),
      return_col_mass=True,
      implementation="xla",
  )


def _causal_gradients(length: int) -> Callable[..., PyTree]:
  attend = _causal_mass(length)
  return programs.with_backward(lambda *arrays: attend(*arrays).out)


PROGRAMS = {
    "forward + col_mass": _causal_mass,
    "forward + backward": _causal_gradients,
}


def report(ops: Sequence[str] = OPS) -> list[harness.Row]:
  """Prints each row when it is known; returns the rows of some of `OPS`."""
  rows = []
  for row in _rows(ops):
    shown = (f"{name}={harness.show(value)}" for name, value in row.items())
    print("  ".join(shown), flush=True)
    rows.append(row)
  return rows


def _rows(ops: Sequence[str]) -> Iterator[harness.Row]:
  if "attention" in ops:
    # A process starts from the peak of its parent, which is small as yet.
    yield from memory_rows(_MEMORY_LENGTH)
    yield from compiled_rows(_COMPILED_LENGTHS)
    yield from dense_rows(LENGTHS)
    yield sparse_row(_SPARSE_LENGTH)
    yield from map(linear_row, _LINEAR_LENGTHS)
  if "mlp" in ops:
    yield from map(mlp_row, _MLPS)
  if "decode" in ops:
    yield decode_cpu.decode_row()
  if "single" in ops:
    yield from single_queries.report()


def dense_rows(
    lengths: Sequence[int],
    *,
    heads: Sequence[tuple[int, int]] = _HEADS,
    kinds: Sequence[Literal["causal", "full"]] = ("causal", "full"),
    num_times: int = 20,
) -> Iterator[harness.Row]:
  """Times forward, forward with column sums, and gradients beside the peer.

  Args:
    lengths: T = S of one sequence.
    heads: Query and key heads.
    kinds: Masks.
    num_times: Calls of each program, 4 times as many up to T = 512.

  Yields:
    Rows; `ratio` is our median time by the peer's, `ratio_of_least` that of the
    shortest, `difference` the largest between results.
  """
  for length, numbers, kind in itertools.product(lengths, heads, kinds):
    shape = shapes.square(length, *numbers, _HEAD_DIM)
    num_calls = num_times * (4 if length <= 512 else 1)
    yield from _time_shape(shape, kind == "causal", num_calls)


def _time_shape(
    shape: shapes.Shape, is_causal: bool, num_times: int
) -> Iterator[harness.Row]:
  mask = masks.causal(shape.num_queries) if is_causal else None
  with_mass = functools.partial(
      api.attention, where=mask, return_col_mass=True, implementation="xla"
  )
  ours = lambda *arrays: api.attention(
      *arrays, where=mask, implementation="xla"
  ).out
  peer = functools.partial(
      jax.nn.dot_product_attention, is_causal=is_causal, implementation="xla"
  )
  arrays = _draw(shape)
  calls = {"peer": peer, "ours": ours, "mass": with_mass}
  calls = {name: jax.jit(call) for name, call in calls.items()}
  times = _time(calls, arrays, num_times)
  row = functools.partial(_row, shape, is_causal)
  difference = jnp.abs(calls["peer"](*arrays) - calls["ours"](*arrays)).max()
  yield row("forward", times) | {"difference": float(difference)}
  yield row("forward + col_mass", times | {"ours": times["mass"]})
  gradients = {
      name: jax.jit(programs.with_backward(call))
      for name, call in (("peer", peer), ("ours", ours))
  }
  d_out = jax.random.normal(jax.random.key(9), arrays[0].shape)
  times = _time(gradients, (*arrays, d_out), num_times)
  yield row("forward + backward", times)


def sparse_row(
    length: int, *, block_q: int = 256, block_kv: int = 128, num_times: int = 20
) -> harness.Row:
  """Times block-sparse attention beside our dense one, both causal.

  Args:
    length: T = S.
    block_q: Queries in a block.
    block_kv: Keys in a block.
    num_times: Calls of each program.
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
  attend = functools.partial(api.attention, implementation="xla")
  calls = {
      "ours": jax.jit(functools.partial(attend, where=chosen)),
      "peer": jax.jit(functools.partial(attend, where=mask)),
  }
  density = cost.density(jax.tree.map(np.asarray, chosen), shape, mask)
  what = f"block-sparse, {density:.0%} of the pairs"
  return _row(shape, True, what, _time(calls, _draw(shape), num_times))


def linear_row(length: int, *, num_times: int = 20) -> harness.Row:
  """Times causal linear attention beside our dense causal attention.

  Args:
    length: T.
    num_times: Calls of each program.
  """
  shape = shapes.square(length, 8, 8, _HEAD_DIM)
  ours = lambda *arrays: linear_api.linear_attention(
      *arrays, decay=jnp.full(8, 0.99), implementation="xla"
  )
  dense = functools.partial(
      api.attention, where=masks.causal(length), implementation="xla"
  )
  calls = {"ours": jax.jit(ours), "peer": jax.jit(dense)}
  times = _time(calls, _draw(shape), num_times)
  return _row(shape, True, "linear attention, by dense", times)


def mlp_row(
    name: str, *, density: float = _MLP_DENSITY, num_times: int = 20
) -> harness.Row:
  """Times a gathered MLP beside the dense one, float32.

  Args:
    name: Of a shape in `gather_mlp.shapes.BENCHMARKS`.
    density: Share of the blocks, rounded.
    num_times: Calls of each program.
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

  def ours(x: Array, weights: parts.Weights, chosen: Array) -> Array:
    given = {k: v for k, v in weights._asdict().items() if v is not None}
    return gather_api.gather_mlp(
        x,
        **given,
        block_ids=chosen,
        activation=activation,
        block_size=shape.block_size,
        implementation="xla",
    )

  dense = lambda x, weights, _: gather_xla.dense(x, weights, activation)
  calls = {"ours": jax.jit(ours), "peer": jax.jit(dense)}
  row = {"what": f"gather MLP at {density:.0%}, by dense", "shape": name}
  row |= {"batch": shape.batch}
  return row | _times(_time(calls, (x, weights, chosen), num_times))


def memory_rows(
    length: int, names: Sequence[str] = tuple(PROGRAMS)
) -> Iterator[harness.Row]:
  """Peak memory of fresh processes that attend causally, in 1e9 bytes."""
  for program in names:
    yield harness.run_child(
        "launch.bench.ops.cpu",
        [program, str(length)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def _peak_memory(program: str, length: int) -> harness.Row:
  """Runs a program in this process, which has done nothing else."""
  arrays = _draw(shapes.square(length, 8, 8, _HEAD_DIM))
  if program == "forward + backward":
    arrays = (*arrays, jnp.ones_like(arrays[0]))
  before = harness.peak_rss_gb()
  jax.block_until_ready(jax.jit(PROGRAMS[program](length))(*arrays))
  return {
      "what": f"{program}, memory",
      "length": length,
      "heads": 8,
      "peak_rss_gb": harness.peak_rss_gb(),
      "before_gb": before,
  }


def compiled_rows(lengths: Sequence[int]) -> Iterator[harness.Row]:
  """Bytes of intermediate arrays of one head's programs, not run."""
  for length, (name, make) in itertools.product(lengths, PROGRAMS.items()):
    arrays = shapes.square(length, 1, 1, _HEAD_DIM).arrays("float32")
    arrays = (*arrays, arrays[0])[: 4 if name == "forward + backward" else 3]
    compiled = jax.jit(make(length)).lower(*arrays).compile()
    memory = compiled.memory_analysis()
    assert memory is not None, "XLA for CPUs tells"
    yield {
        "what": f"{name}, compiled",
        "length": length,
        "temp_mb": memory.temp_size_in_bytes / 1e6,
        "one_byte_a_pair_mb": length**2 / 1e6,
    }


def _draw(shape: shapes.Shape) -> tuple[jax.Array, ...]:
  keys = jax.random.split(jax.random.key(0), 3)
  return tuple(
      jax.random.normal(key, array.shape)
      for key, array in zip(keys, shape.arrays("float32"), strict=True)
  )


def _time(
    calls: Mapping[str, Callable[..., PyTree]],
    arrays: Sequence[PyTree],
    num_times: int,
) -> dict[str, np.ndarray]:
  """Seconds of each call on the same arrays."""
  turns = {
      name: functools.partial(lambda f: jax.block_until_ready(f(*arrays)), call)
      for name, call in calls.items()
  }
  return harness.take_turns(turns, num_times, num_warm_ups=2)


def _row(
    shape: shapes.Shape,
    is_causal: bool,
    what: str,
    times: Mapping[str, np.ndarray],
) -> harness.Row:
  return {
      "what": what,
      "length": shape.num_queries,
      "heads": f"{shape.num_heads}/{shape.num_kv_heads}",
      "mask": "causal" if is_causal else "full",
      **_times(times),
  }


def _times(times: Mapping[str, np.ndarray]) -> harness.Row:
  """Medians, quartiles and ratios; the machine's load."""
  ours, peer = times["ours"], times["peer"]
  return {
      **harness.quartiles_ms(ours, "ours_"),
      **harness.quartiles_ms(peer, "peer_"),
      "ratio": float(np.median(ours) / np.median(peer)),
      "ratio_of_least": float(ours.min() / peer.min()),
      "num_times": len(ours),
      "load_1min": os.getloadavg()[0],
  }


if __name__ == "__main__":  # A fresh process of `memory_rows`.
  print(json.dumps(_peak_memory(sys.argv[1], int(sys.argv[2]))))
