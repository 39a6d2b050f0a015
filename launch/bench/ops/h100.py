"""What ptxas says of the Mosaic GPU kernels, compiled for an H100 without one.

The part of `launch.bench.kernels` for --target=h100: registers of a thread,
bytes spilled, and shared memory of a block. Of attention, for the kernels of
forward pass, column sums and both gradients under masks from simple to
everything at once. Of what is bound by memory beside the roofline, the longer
of needed operations and needed bytes at the chip's peaks, and what it is of the
peer's: a step over 32,768 slots, the dense MLP, linear attention of a quarter
of the length. Nothing is measured: what a kernel takes beyond its roofline,
only a GPU shows.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
import numpy as np

from kernels_pallas import masks
from kernels_pallas.aot import chips
from kernels_pallas.attention import api
from kernels_pallas.attention import cost as attention_cost
from kernels_pallas.attention import shapes
from kernels_pallas.decode import cost as decode_cost
from kernels_pallas.gather_mlp import cost as gather_cost
from kernels_pallas.gather_mlp import shapes as gather_shapes
from kernels_pallas.linear_attention import cost as linear_cost
from launch.bench import harness
from launch.bench.ops import compiled
from launch.bench.ops import programs

OPS = ("attention", "decode", "mlp")
# Variant, head size, query heads of a key head.
ATTENTION = (
    ("causal", 64, 1),
    ("causal", 128, 1),
    ("causal", 128, 8),
    ("all options", 64, 8),
    ("all options", 128, 8),
    ("selection", 128, 4),
)
_LENGTH = 2048
# Positions of a chunk, for the count of operations.
_CHUNK = 64
_OF_KERNEL: harness.Columns = {
    "registers": ("registers", str),
    "spilled_bytes": ("bytes spilled", str),
    "smem_kib": ("shared KiB", "{:.3g}".format),
    "num_wgmma": ("wgmma", str),
    "num_tma_loads": ("TMA loads", str),
}
_ATTENTION_COLUMNS: harness.Columns = {
    "kernel": ("kernel", str),
    "variant": ("mask", str),
    "head_dim": ("H", str),
    "group": ("G", str),
    **_OF_KERNEL,
    "note": ("note", str),
}
_COLUMNS: harness.Columns = {
    "kernel": ("kernel", str),
    "case": ("of", str),
    **_OF_KERNEL,
    "temp_mib": ("temporary MiB", "{:.3g}".format),
    "roofline_us": ("roofline us", "{:.3g}".format),
    "of_peer": ("of peer's", "{:.3g}".format),
    "note": ("note", str),
}


def gradients(variant: str, head_dim: int, group: int) -> programs.Program:
  """A training step that uses all four kernels of attention."""
  options: dict[str, Any] = {"return_lse": True, "return_col_mass": True}
  options["implementation"] = "pallas_gpu"
  if variant == "selection":
    options["where"] = programs.random_selection(
        _LENGTH, group, 256, 256, density=0.25
    )
  elif variant == "causal":
    options["where"] = masks.causal(_LENGTH)
  else:
    ids = np.arange(_LENGTH) % 7
    near = masks.streaming(_LENGTH, window=300, num_sinks=4)
    options["where"] = masks.hash_sparse(ids, ids) & near
    options.update(logits_soft_cap=30.0, sink_logits=jnp.zeros(group))

  def loss(*arrays: Array) -> tuple[Array, PyTree]:
    result = api.attention(*arrays, **options)
    assert result.lse is not None, "it is asked for"
    total = result.out.astype(jnp.float32).sum() + result.lse.sum()
    return total, result.col_mass

  run = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
  return run, shapes.square(_LENGTH, group, 1, head_dim).arrays(jnp.bfloat16)


def attention_cases(
    variants: Sequence[tuple[str, int, int]] = ATTENTION,
) -> list[compiled.Case]:
  """Attention's kernels; no roofline, for a program has four of them."""
  found = []
  for variant, head_dim, group in variants:
    facts = {"variant": variant, "head_dim": head_dim, "group": group}
    case = compiled.Case(
        kernel=variant, program=gradients, options=facts, facts=facts
    )
    found.append(case)
  return found


def decode_cases(
    capacities: Sequence[int] = (32_768, 4096),
) -> list[compiled.Case]:
  """A step over so many slots, the first of which are all of them."""
  found = []
  full = decode_cost.step(programs.decode_shape(1, capacities[0]))
  for capacity in capacities:
    shape = programs.decode_shape(1, capacity)
    for dtype, itemsize in (("bfloat16", 2), ("int8", 1)):
      case = compiled.Case(
          kernel=f"decode C={capacity} {dtype}",
          program=programs.decode_on,
          options={"batch": 1, "capacity": capacity, "cache_dtype": dtype},
          work=decode_cost.step(shape, cache_itemsize=itemsize),
      )
      found.append(_beside(case, full))
  return found


def mlp_cases(
    names: Sequence[str] = ("opt_6.7b_b16", "llama3_8b_b16"),
    density: float = 0.1,
) -> list[compiled.Case]:
  """Chosen blocks of MLPs in `gather_mlp.shapes.BENCHMARKS`, and gradients."""
  found = []
  for name in names:
    shape = gather_shapes.BENCHMARKS[name]
    for is_backward in (False, True):
      count = gather_cost.backward if is_backward else gather_cost.forward
      case = compiled.Case(
          kernel=f"{name} at {density:.0%}"
          + (" gradients" if is_backward else ""),
          program=programs.gather_mlp,
          options={
              "shape": name,
              "density": density,
              "is_backward": is_backward,
              "implementation": "pallas_gpu",
          },
          work=count(shape, programs.num_chosen(name, density)),
      )
      found.append(_beside(case, count(shape, shape.num_blocks)))
  return found


def linear_cases(
    lengths: Sequence[int] = (4096, 16_384, 65_536),
) -> list[compiled.Case]:
  """Linear attention of growing lengths, each beside the one before it."""
  found, before = [], None
  for length in lengths:
    case = compiled.Case(
        kernel=f"linear T={length}",
        program=programs.linear,
        options={"length": length, "implementation": "pallas_gpu"},
        work=linear_cost.forward(programs.linear_shape(length), _CHUNK),
    )
    found.append(_beside(case, before))
    before = case.work
  return found


def _beside(
    case: compiled.Case, peer: attention_cost.Cost | None
) -> compiled.Case:
  """The case with its roofline, and what it is of the peer's."""
  facts = {"case": case.kernel, "roofline_us": _roofline_us(case.work)}
  of_peer = peer and facts["roofline_us"] / _roofline_us(peer)
  return dataclasses.replace(case, facts=facts | {"of_peer": of_peer})


def _roofline_us(work: attention_cost.Cost | None) -> float:
  assert work is not None, "cases beside a peer have theirs"
  return compiled.roofline(chips.get_chip("h100"), work)["roofline_us"]


def slope(cases: Sequence[compiled.Case]) -> float:
  """Of log roofline over log T, of linear attention's first and last length."""
  first, last = cases[0], cases[-1]
  lengths = last.options["length"] / first.options["length"]
  rooflines = last.facts["roofline_us"] / first.facts["roofline_us"]
  return math.log(rooflines) / math.log(lengths)


def table(rows: Sequence[harness.Row]) -> str:
  """Formats rows of what is bound by memory as a Markdown table."""
  return harness.table(_COLUMNS, rows)


def report(ops: Sequence[str] = OPS) -> list[harness.Row]:
  """Compiles and prints; returns the rows.

  Args:
    ops: Which of `OPS`; linear attention goes with attention.

  Raises:
    ToolchainMissing: If the CUDA plugin or ptxas is not there.
  """
  print(f"h100, jax {jax.__version__}: compiled, not run; bfloat16.\n")
  rows: list[harness.Row] = []
  cases = decode_cases() if "decode" in ops else []
  cases += mlp_cases() if "mlp" in ops else []
  if "attention" in ops:
    rows += compiled.h100_rows(attention_cases())
    print(harness.table(_ATTENTION_COLUMNS, rows), end="\n\n")
    cases += linear_cases()
  others = compiled.h100_rows(cases)
  print(table(others))
  if "attention" in ops:
    growth = slope(linear_cases())
    print(f"\nlinear attention's roofline grows as T^{growth:.2f}")
  rows += others
  spilling = [row for row in rows if row.get("spilled_bytes")]
  print(f"\n{len(spilling)} of {len(rows)} kernels spill registers")
  return rows
