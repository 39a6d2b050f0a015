"""The gated delta rule beside dense attention, and beside its recurrence.

The part of `launch.bench.kernels` for --ops=delta. On a CPU, times of XLA's
gradients take turns with those of a scan by positions, and with our dense
attention's; on a TPU that is not there, bundles of the schedule, static, not
measured; for an H100, registers and spills.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
import itertools
import os

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from kernels_pallas import implementations
from kernels_pallas import masks
from kernels_pallas.aot import chips
from kernels_pallas.attention import api as attention_api
from kernels_pallas.gated_delta_rule import api
from kernels_pallas.gated_delta_rule import cost
from kernels_pallas.gated_delta_rule import shapes
from launch.bench import harness
from launch.bench.ops import compiled
from launch.bench.ops import programs
from launch.bench.ops import tpu

_CHUNK = 64
# The loop by positions is compiled and run as far as this.
_LONGEST_LOOP = 4096
_COLUMNS: harness.Columns = {
    "length": ("T", "{:,}".format),
    "kernel": ("kernel", str),
    "static_bundles": ("bundles", "{:,}".format),
    "per_token": ("a token", "{:.2f}".format),
    "spills": ("spills", str),
    "vmem_mib": ("VMEM MiB", "{:.1f}".format),
    "temp_mib": ("temp MiB", "{:.1f}".format),
    "note": ("note", str),
}


def shape_of(
    length: int,
    num_heads: int = 8,
    value_size: int = 128,
    is_by_channel: bool = False,
) -> shapes.Shape:
  """Heads that share nothing, with keys of 128."""
  return shapes.Shape(
      length=length,
      num_heads=num_heads,
      num_key_heads=num_heads,
      key_size=programs.HEAD_DIM,
      value_size=value_size,
      is_by_channel=is_by_channel,
  )


def delta(
    length: int,
    num_heads: int = 8,
    value_size: int = 128,
    is_by_channel: bool = False,
    is_backward: bool = False,
    implementation: implementations.Implementation = "pallas_tpu",
) -> programs.Program:
  """The op, or its gradients by all five arrays; see `programs`."""
  shape = shape_of(length, num_heads, value_size, is_by_channel)
  attend = lambda *arrays: api.gated_delta_rule(
      *arrays, implementation=implementation
  ).out
  arrays = shape.arrays()
  if not is_backward:
    return attend, arrays
  gradients = lambda *x: jax.vjp(attend, *x[:-1])[1](x[-1])
  return gradients, (*arrays, arrays[2])


def report(target: str, lengths: Sequence[int]) -> list[harness.Row]:
  """Prints the figures of a target; returns the rows.

  Args:
    target: cpu, tpu:CHIP, or h100.
    lengths: T.

  Raises:
    ValueError: If there is no such target.
    ToolchainMissing: If its compiler is not installed.
  """
  if target == "cpu":
    rows = []
    for row in itertools.chain.from_iterable(map(cpu_rows, lengths)):
      harness.tell(f"T={row['length']:,}", row)
      rows.append(row)
    return rows
  if target in ("h100", "gpu:h100"):
    rows = compiled.h100_rows(_cases(lengths, 8, "pallas_gpu"))
    harness.tell("gated delta rule", rows)
    return rows
  platform, _, name = target.partition(":")
  if platform != "tpu" or name not in chips.TPU_NAMES:
    raise ValueError(f"--ops=delta knows cpu, tpu:CHIP and h100, not {target}")
  rows = tpu_rows(chips.get_chip(name), lengths)
  print(f"{name}, {tpu.versions()}; a head a core, bfloat16\n")
  print(harness.table(_COLUMNS, rows) + "\n")
  print("\n".join(crossings(rows)))
  return rows


def tpu_rows(
    chip: chips.Chip, lengths: Sequence[int], num_heads: int = 4
) -> list[harness.Row]:
  """Rows of the op and of dense attention, of as many heads a core."""
  heads = num_heads * chip.num_cores
  cases = _cases(lengths, heads, "pallas_tpu")
  for length in lengths:
    dense = tpu.dense_cases(length, heads)
    cases += [case for case in dense if case.kernel in ("forward", "backward")]
  rows = [row for _, row, _ in compiled.tpu_rows(chip, cases)]
  for row in rows:
    if "static_bundles" in row:
      row["per_token"] = row["static_bundles"] / row["length"] / num_heads
  return rows


def crossings(rows: Sequence[harness.Row]) -> list[str]:
  """From which length on the op takes fewer bundles than dense attention."""
  found = {
      (row["kernel"], row["length"]): row["static_bundles"]
      for row in rows
      if row.get("static_bundles")
  }
  sentences = []
  for name in ("delta", "delta by channel"):
    for part, dense in (("", "forward"), (" backward", "backward")):
      kernel = name + part
      ratios = sorted(
          (length, bundles / found[dense, length])
          for (own, length), bundles in found.items()
          if own == kernel and (dense, length) in found
      )
      sentences += [
          f"T={n:,}: {kernel} {ratio:.2f} of our dense {dense}"
          for n, ratio in ratios
      ]
      if ratios:
        crossing = tpu.crossing(ratios)
        sentences.append(crossing.replace("linear attention", kernel, 1))
  return sentences


def _cases(
    lengths: Sequence[int],
    num_heads: int,
    implementation: implementations.Implementation,
) -> list[compiled.Case]:
  cases = []
  for length, by_channel, is_backward in itertools.product(
      lengths, (False, True), (False, True)
  ):
    shape = shape_of(length, num_heads, is_by_channel=by_channel)
    count = cost.backward if is_backward else cost.forward
    name = "delta by channel" if by_channel else "delta"
    cases.append(
        compiled.Case(
            kernel=name + " backward" * is_backward,
            program=delta,
            options={
                "length": length,
                "num_heads": num_heads,
                "is_by_channel": by_channel,
                "is_backward": is_backward,
                "implementation": implementation,
            },
            work=count(shape, _CHUNK),
            facts={"length": length},
            # A gradient's program makes the result, too, but for what is
            # dropped.
            last=2 if is_backward and implementation == "pallas_tpu" else 0,
        )
    )
  return cases


def cpu_rows(length: int, *, num_times: int = 5) -> Iterator[harness.Row]:
  """Times of forward and backward, float32, with 8 heads of 128.

  Args:
    length: T.
    num_times: Calls of each program.

  Yields:
    A row a kind of decay: seconds, bytes of intermediate arrays, and ratios to
    the loop by positions (up to T = 4096) and to dense causal attention.
  """
  for by_channel in (False, True):
    shape = shape_of(length, is_by_channel=by_channel)
    arrays = _draw(shape)
    calls = {"ours": gradients_of("xla"), "dense": _dense(length)}
    if length <= _LONGEST_LOOP:
      calls["loop"] = gradients_of("reference")
    made = {name: call.lower(*arrays).compile() for name, call in calls.items()}
    turns = {
        name: functools.partial(_wait_for, call, arrays)
        for name, call in made.items()
    }
    times = harness.take_turns(turns, num_times, num_warm_ups=1)
    row: harness.Row = {
        "what": "delta by channel" if by_channel else "delta",
        "length": length,
        "num_times": num_times,
        "load_1min": os.getloadavg()[0],
    }
    for name, call in made.items():
      memory = call.memory_analysis()
      assert memory is not None, "XLA for CPUs tells"
      row |= {
          f"{name}_s": float(np.median(times[name])),
          f"{name}_temp_mib": memory.temp_size_in_bytes / 2**20,
      }
      if name != "ours":
        row[f"by_{name}"] = harness.ratio(times["ours"], times[name])
    yield row


def gradients_of(
    implementation: implementations.Implementation,
) -> jax.stages.Wrapped:
  """The gradients by all five arrays of a sum of squares."""

  def loss(*arrays: Array) -> Array:
    found = api.gated_delta_rule(*arrays, implementation=implementation)
    return (found.out**2).sum()

  return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))


def _dense(length: int) -> jax.stages.Wrapped:
  def loss(query: Array, key: Array, value: Array, *gates: Array) -> Array:
    del gates
    found = attention_api.attention(
        query, key, value, where=masks.causal(length), implementation="xla"
    )
    return (found.out**2).sum()

  return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def _wait_for(
    call: Callable[..., tuple[Array, ...]], arrays: tuple[Array, ...]
) -> None:
  jax.block_until_ready(call(*arrays))


def _draw(shape: shapes.Shape) -> tuple[Array, ...]:
  """Unit keys, decays near 1 and beta between 0 and 1."""
  keys = jax.random.split(jax.random.key(0), 5)
  query, key, value, log_decay, beta = (
      jax.random.normal(k, x.shape)
      for k, x in zip(keys, shape.arrays(), strict=True)
  )
  key /= jnp.linalg.norm(key, axis=-1, keepdims=True)
  return query, key, value, -0.1 * jnp.abs(log_decay), jax.nn.sigmoid(beta)
