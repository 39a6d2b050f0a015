"""Static schedules of the attention kernels on a TPU that is not there.

The part of `launch.bench.kernels` for --target=tpu:CHIP; what the figures are
says `launch.bench.ops.compiled`. Nothing is measured.
"""

from collections.abc import Iterable, Mapping, Sequence
import functools
import importlib.metadata
import itertools

import jax

from kernels_pallas import masks
from kernels_pallas.aot import chips
from kernels_pallas.aot import topology
from kernels_pallas.attention import cost
from kernels_pallas.attention import shapes
from kernels_pallas.linear_attention import cost as linear_cost
from kernels_pallas.linear_attention import shapes as linear_shapes
from launch.bench import harness
from launch.bench.around import memory_tpu
from launch.bench.around import planning_tpu
from launch.bench.ops import compiled
from launch.bench.ops import decode_tpu
from launch.bench.ops import mlp_tpu
from launch.bench.ops import peers
from launch.bench.ops import prefill_tpu
from launch.bench.ops import programs

# Tiles of a selection, and the two densities through which the line goes.
SPARSE_TILES = ((128, 128), (128, 256), (256, 512), (512, 512), (512, 1024))
DENSITIES = (0.1, 0.3)
# Tiles of jax's splash attention: queries, keys, and keys of a product. Of 22
# that fit a v5e at 4,096 and of four at 16,384 the best of each chip and length
# are among these; larger ones outgrow VMEM.
SPLASH_TILES = ((1024, 1024, 512), (1024, 2048, 256), (1024, 2048, 512))
OPS = ("attention", "mlp", "decode", "prefill", "planning", "memory")
# Where linear attention and our dense forward pass are close.
LINEAR_LENGTHS = (256, 512, 1024)
CALIBRATION = (
    "Static, not measured: stalls on HBM and transposes around the kernels are"
    " left out. On a v6e, timings that others published of splash attention are"
    " 0.94 to 1.18 times such figures at 16,384 positions, and more at shorter"
    " lengths (1.03 to 1.13 at 4,096, up to 2.2 at 2,048); no other chip is"
    " calibrated."
)
_COLUMNS: harness.Columns = {
    "shape": ("shape", str),
    "kernel": ("kernel", str),
    "gflops": ("GFLOP", "{:.1f}".format),
    "hbm_mb": ("HBM MB", "{:.1f}".format),
    "roofline_us": ("roofline us", "{:.1f}".format),
    "vmem_mib": ("VMEM MiB", "{:.1f}".format),
    "spills": ("spills", str),
    "steps": ("grid steps", "{:,}".format),
    "per_step": ("bundles a step", "{:,.0f}".format),
    "static_bundles": ("bundles", "{:,}".format),
    "static_us": ("static us", "{:.1f}".format),
    "note": ("note", str),
}


def measure(
    chip: chips.Chip,
    lengths: Sequence[int],
    sparse_length: int = 32_768,
    sparse_tiles: Sequence[tuple[int, int]] = SPARSE_TILES,
    linear_lengths: Sequence[int] = (),
    num_workers: int = 2,
) -> list[harness.Row]:
  """Compiles every case; a row of figures for each.

  Args:
    chip: What for.
    lengths: T of dense attention.
    sparse_length: T of block-sparse attention, 0 for none.
    sparse_tiles: Queries and keys of its blocks.
    linear_lengths: T of linear attention, with and without a dense forward.
    num_workers: Compilers to run side by side.

  Raises:
    ToolchainMissing: If the compiler is not installed.
  """
  num_heads = chip.num_cores
  cases = [x for n in lengths for x in dense_cases(n, num_heads)]
  for n in linear_lengths:
    cases += linear_cases(n, chip)[n in lengths :]  # The dense one is there.
  if sparse_length:
    cases += sparse_cases(sparse_length, num_heads, sparse_tiles)
  return [row for _, row, _ in compiled.tpu_rows(chip, cases, num_workers)]


def table(rows: Sequence[harness.Row]) -> str:
  """Formats rows as a Markdown table."""
  return harness.table(_COLUMNS, rows)


def dense_cases(length: int, num_heads: int) -> list[compiled.Case]:
  """Causal attention, by our kernels and by jax's."""
  shape = shapes.square(length, num_heads, num_heads)
  pairs = cost.num_pairs(masks.causal(length), shape)
  both = {"length": length, "num_heads": num_heads}
  case = functools.partial(compiled.Case, facts=_facts(length))
  forward = functools.partial(case, work=cost.forward(shape, pairs))
  backward = functools.partial(case, work=cost.backward(shape, pairs), last=1)
  summed = functools.partial(
      case,
      program=programs.forward,
      work=cost.forward(shape, pairs, return_col_mass=True),
  )
  emits = both | {"return_col_mass": True}
  two_pass = emits | {"col_mass": "two_pass"}
  cases = [
      forward(kernel="forward", program=programs.forward, options=both),
      summed(kernel="forward + col_mass", options=emits),
      summed(kernel="the same in two passes", options=two_pass),
      backward(kernel="backward", program=programs.backward, options=both),
  ]
  for block in (512, 1024):
    options = both | {"block": block}
    cases += [
        forward(
            kernel=f"jax {program.__name__} {block}",
            program=program,
            options=options,
        )
        for program in (peers.flash, peers.splash)
    ]
    options = options | {"is_backward": True}
    name = f"jax splash fused backward {block}"
    cases.append(backward(kernel=name, program=peers.splash, options=options))
  for tiles in SPLASH_TILES:
    if max(tiles) <= length:
      name = f"jax splash {'/'.join(map(str, tiles))}"
      options = both | {"block": tiles}
      cases.append(forward(kernel=name, program=peers.splash, options=options))
  return cases


def linear_cases(length: int, chip: chips.Chip) -> list[compiled.Case]:
  """Linear attention, and our dense causal attention to compare it with."""
  num_heads = chip.num_cores
  sizes = {"length": length, "num_heads": num_heads}
  shape = linear_shapes.Shape(
      **sizes, num_kv_heads=num_heads, head_dim=programs.HEAD_DIM
  )
  dense, *_ = dense_cases(length, num_heads)
  # Twice the side of a matrix unit, as the kernel chooses.
  chunk = min(512 if chip.name in ("v6e", "v7x") else 256, length)
  linear = compiled.Case(
      kernel="linear attention",
      facts=_facts(length),
      program=programs.linear,
      options=sizes,
      work=linear_cost.forward(shape, chunk),
  )
  return [dense, linear]


def sparse_cases(
    length: int, num_heads: int, all_tiles: Iterable[tuple[int, int]]
) -> list[compiled.Case]:
  """Block-sparse attention, and dense attention to compare it with."""
  shape = shapes.square(length, num_heads, num_heads)
  every = cost.num_pairs(None, shape)
  case = functools.partial(compiled.Case, facts=_facts(length))
  both = {"length": length, "num_heads": num_heads}
  dense = {x.kernel: x for x in dense_cases(length, num_heads)}
  cases = [
      dense["forward"],
      case(
          kernel="forward, no mask",
          program=programs.forward,
          options=both | {"is_causal": False},
          work=cost.forward(shape, every),
      ),
      dense["backward"],
  ]
  for tiles, density in itertools.product(all_tiles, DENSITIES):
    selection = programs.random_selection(length, num_heads, *tiles, density)
    listed = cost.num_pairs(selection, shape)
    options = both | {"density": density}
    options |= dict(zip(("block_q", "block_kv"), tiles, strict=True))
    name = _sparse_name(tiles, density)
    sparse = functools.partial(case, program=programs.sparse)
    cases.append(
        sparse(kernel=name, options=options, work=cost.forward(shape, listed))
    )
    if density == DENSITIES[0] and tiles[1] == 512:
      cases.append(
          sparse(
              kernel=f"{name} backward",
              options=options | {"is_backward": True},
              work=cost.backward(shape, listed),
              last=1,
          )
      )
  return cases


def _sparse_name(tiles: tuple[int, int], density: float) -> str:
  return f"block-sparse {tiles[0]}x{tiles[1]} {density:.0%}"


def _facts(length: int) -> harness.Row:
  """A name as in the shapes of the op, of which a head is taken; the length."""
  names = {
      shape.num_queries: name
      for name, shape in reversed(shapes.BENCHMARKS.items())
      if shape.num_queries == shape.num_keys
      and shape.head_dim == programs.HEAD_DIM
  }
  names |= {4096: "mha_4k", 16_384: "mha_16k"}
  return {"shape": names.get(length, f"T={length}"), "length": length}


def summary(rows: Sequence[harness.Row]) -> list[str]:
  """Compares kernels with each other and with jax's: a sentence each."""
  sentences = []
  for length in dict.fromkeys(row["length"] for row in rows):
    found = {
        row["kernel"]: row["static_bundles"]
        for row in rows
        if row["length"] == length and row.get("static_bundles")
    }
    sentences += _of_dense(length, found) + _of_sparse(length, found)
  return sentences + _of_linear(rows)


def _of_dense(length: int, found: Mapping[str, int]) -> list[str]:
  peers = {name: n for name, n in found.items() if name.startswith("jax")}
  is_backward = {name: "backward" in name for name in peers}
  best = lambda kind: min(
      (n for name, n in peers.items() if is_backward[name] is kind),
      default=None,
  )
  pairs = (
      ("forward", "the best of jax's", best(False)),
      ("forward + col_mass", "our forward", found.get("forward")),
      ("the same in two passes", "our forward", found.get("forward")),
      ("forward + col_mass", "the best of jax's", best(False)),
      ("backward", "jax's best fused backward", best(True)),
  )
  return [
      f"T={length:,}: {name} {found[name] / other:.2f} of {what}"
      for name, what, other in pairs
      if name in found and other
  ]


def _of_sparse(length: int, found: Mapping[str, int]) -> list[str]:
  """Where block-sparse attention beats our dense causal one."""
  dense = found.get("forward")
  sentences = []
  for tiles in SPARSE_TILES:
    low, high = (found.get(_sparse_name(tiles, d)) for d in DENSITIES)
    if dense and low and high:
      density = break_even(dense, low, high)
      name = f"{tiles[0]}x{tiles[1]}"
      sentences.append(
          f"T={length:,}: blocks of {name} beat dense causal attention below"
          f" {density:.0%} of its blocks; at {DENSITIES[0]:.0%} they take"
          f" {dense / low:.1f}x fewer bundles"
      )
  if "forward, no mask" in found and sentences:
    ratio = found["forward, no mask"] / dense if dense else 0
    sentences.append(
        f"T={length:,}: dense attention without a mask takes {ratio:.2f}x as"
        " many as causal attention"
    )
  return sentences


def _of_linear(rows: Sequence[harness.Row]) -> list[str]:
  """From which length on linear attention takes fewer bundles than dense."""
  found = {
      (row["kernel"], row["length"]): row["static_bundles"]
      for row in rows
      if row.get("static_bundles")
  }
  lengths = sorted(n for name, n in found if name == "linear attention")
  ratios = [
      (n, found["linear attention", n] / found["forward", n])
      for n in lengths
      if ("forward", n) in found
  ]
  sentences = [
      f"T={n:,}: linear attention {ratio:.2f} of our dense forward,"
      f" {found['linear attention', n] / n:.2f} bundles a position"
      for n, ratio in ratios
  ]
  return sentences + ([crossing(ratios)] if ratios else [])


def crossing(ratios: Sequence[tuple[int, float]]) -> str:
  """Where the ratio of linear to dense attention falls to 1.

  Args:
    ratios: Lengths, ascending, and the ratio at each; a line between them.
  """
  what = "linear attention takes fewer bundles than dense"
  if ratios[0][1] < 1:
    return f"{what} at T={ratios[0][0]:,} and above"
  for (low, above), (high, below) in itertools.pairwise(ratios):
    if below < 1:
      length = low + (high - low) * (above - 1) / (above - below)
      return f"{what} from T={length:,.0f} on"
  return f"{what} nowhere up to T={ratios[-1][0]:,}"


def break_even(dense: int, low: int, high: int) -> float:
  """The density at which a line through two densities meets `dense`."""
  slope = (high - low) / (DENSITIES[1] - DENSITIES[0])
  return DENSITIES[0] + (dense - low) / slope


def versions() -> str:
  """What compiled."""
  libtpu = importlib.metadata.version("libtpu")
  return f"jax {jax.__version__}, libtpu {libtpu}"


def report(
    name: str,
    lengths: Sequence[int],
    sparse_length: int,
    ops: Sequence[str] = OPS,
) -> list[harness.Row]:
  """Prints what `measure` finds for the chip of this name; returns the rows.

  Args:
    name: In `chips`.
    lengths: Of attention's programs.
    sparse_length: Of block-sparse ones; 0 is none.
    ops: Which of `OPS`.

  Raises:
    ValueError: If there is no such TPU.
    ToolchainMissing: If the compiler is not installed.
  """
  chip = chips.get_chip(name)
  if chip.platform != "tpu":
    raise ValueError(f"no TPU {name!r}; known are {', '.join(chips.TPU_NAMES)}")
  topology.require("tpu")
  rows = []
  if "attention" in ops:
    rows += _report_attention(chip, lengths, sparse_length)
  if "mlp" in ops:
    rows += mlp_tpu.report(chip)
  if "decode" in ops:
    rows += decode_tpu.report(chip)
  if "prefill" in ops:
    rows += prefill_tpu.report(chip, sparse_length)
  if "planning" in ops:
    rows += planning_tpu.report(chip, sparse_length)
  if "memory" in ops:
    rows += memory_tpu.report(chip)
  return rows


def _report_attention(
    chip: chips.Chip, lengths: Sequence[int], sparse_length: int
) -> list[harness.Row]:
  linear_lengths = sorted({*LINEAR_LENGTHS, *lengths})
  rows = measure(chip, lengths, sparse_length, linear_lengths=linear_lengths)
  print(
      f"{chip.name}, {versions()}; {chip.num_cores} causal head(s) of"
      f" {programs.HEAD_DIM}, one a core, bfloat16. {CALIBRATION}\n"
  )
  print(table(rows) + "\n")
  print("\n".join(summary(rows)))
  return rows
