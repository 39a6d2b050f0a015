"""What attention's two passes allocate on a TPU that is not there.

A part of `launch.bench.kernels` for --target=tpu:CHIP --ops=memory: bytes of
temporaries of a forward and a backward pass, as the compiler counts them, and
of query, key, value and the cotangent of out, its arguments. Causal, bfloat16,
heads of 128, one sequence.
"""

from collections.abc import Iterator, Sequence

from kernels_pallas import masks
from kernels_pallas.aot import chips
from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.attention import api
from launch.bench import harness
from launch.bench.ops import programs

# Length, query heads and key heads.
SIZES = (
    (131_072, 5, 1),
    (131_072, 1, 1),
    (131_072, 2, 2),
    (131_072, 16, 8),
    (65_536, 32, 8),
    (32_768, 32, 32),
    (32_768, 32, 1),
    (16_384, 32, 8),
    (4096, 32, 32),
)
_COLUMNS: harness.Columns = {
    "chip": ("chip", str),
    "length": ("T", "{:,}".format),
    "num_heads": ("N", str),
    "num_kv_heads": ("K", str),
    "argument_mib": ("arguments MiB", "{:,.0f}".format),
    "temp_mib": ("temporary MiB", "{:,.0f}".format),
    "share": ("of the arguments", "{:.2f}".format),
}


def both_passes(
    length: int, num_heads: int, num_kv_heads: int
) -> programs.Program:
  """Gradients by query, key and value for a cotangent of out."""
  query, key = (
      programs.heads_last(length, n) for n in (num_heads, num_kv_heads)
  )
  attend = lambda *arrays: api.attention(
      *arrays, where=masks.causal(length), implementation="pallas_tpu"
  ).out
  return programs.with_backward(attend), (query, key, key, query)


def measure(
    chip: chips.Chip, sizes: Sequence[tuple[int, int, int]] = SIZES
) -> Iterator[harness.Row]:
  """Yields a row a size.

  Args:
    chip: What for.
    sizes: T, N and K of each.

  Raises:
    OutOfHbm: If a size does not fit into the chip.
    ToolchainMissing: If the compiler is not installed.
  """
  for size in sizes:
    run, arguments = both_passes(*size)
    found = compile_lib.compile_for(chip, run, *arguments)
    num_bytes = sum(x.size * x.dtype.itemsize for x in arguments)
    row = dict(zip(("length", "num_heads", "num_kv_heads"), size, strict=True))
    yield {
        "chip": chip.name,
        **row,
        "argument_mib": num_bytes / 2**20,
        "temp_mib": found.temp_bytes / 2**20,
        "share": found.temp_bytes / num_bytes,
    }


def report(chip: chips.Chip) -> list[harness.Row]:
  """Prints what `measure` finds; returns it."""
  rows = list(measure(chip))
  print(f"\nTemporaries of attention's forward and backward, {chip.name}:\n")
  print(harness.table(_COLUMNS, rows))
  return rows
