"""Compiles a function for a chip that is not there; reads off the result."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.extend as jex
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from kernels_pallas.aot import chips
from kernels_pallas.aot import hlo as hlo_lib
from kernels_pallas.aot import overflow
from kernels_pallas.aot import topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  """A program compiled for a chip.

  Of a Pallas kernel, `flops`, `bytes_accessed` and `optimal_seconds` repeat
  what its `pl.CostEstimate` declares: they are no evidence about the kernel.

  Attributes:
    chip: What for.
    executable: The compiled program; it cannot run here.
    jaxpr: What it was compiled from.
    hlo: Its text.
    temp_bytes: What it allocates beside arguments and outputs, a device.
    argument_bytes: Of the arguments.
    output_bytes: Of the outputs.
    alias_bytes: Of outputs that take the place of donated arguments.
    flops: Operations by XLA's account; None where it has none.
    bytes_accessed: HBM traffic by XLA's account.
    optimal_seconds: Time by XLA's account, in which a kernel that declares no
      cost takes none. None when negative, as it is if XLA itself lacks a cost.
    copies: Copies from HBM to HBM of at least the size asked for.
    scoped_vmem_bytes: VMEM that each Pallas kernel takes, by its name.
  """

  chip: chips.Chip
  executable: jax.stages.Compiled
  jaxpr: jex.core.ClosedJaxpr
  hlo: str
  temp_bytes: int
  argument_bytes: int
  output_bytes: int
  alias_bytes: int
  flops: float | None
  bytes_accessed: float | None
  optimal_seconds: float | None
  copies: tuple[hlo_lib.Copy, ...]
  scoped_vmem_bytes: dict[str, int]

  @property
  def num_custom_calls(self) -> int:
    """How many Pallas kernels the program calls."""
    return len(self.scoped_vmem_bytes)


def compile_for(
    chip: chips.Chip | str,
    fn: Callable[..., Any],
    *args: PyTree,
    min_copy_bytes: int = 1 << 20,
    **static: Any,
) -> Compiled:
  """Compiles `fn(*args, **static)` for one device of a chip.

  Args:
    chip: What for, or its name.
    fn: The function. A jitted one keeps its options, such as donated arguments.
    *args: Trees of arrays or `jax.ShapeDtypeStruct`; only shapes matter.
    min_copy_bytes: Smaller copies are not worth a line in `copies`.
    **static: Arguments that are not arrays. A jitted `fn` must name them in its
      `static_argnames`.

  Raises:
    OutOfVmem: If a kernel takes more VMEM than it may.
    OutOfSmem: If a kernel takes more scalar (GPU: shared) memory than there is.
    OutOfHbm: If the device has too little memory.
    ToolchainMissing: If what compiles for the chip is not installed.
  """
  chip = chips.get_chip(chip) if isinstance(chip, str) else chip
  mesh = topology.device_mesh(chip)
  sharding = NamedSharding(mesh, PartitionSpec())
  args = jax.tree.map(lambda x: _abstract(x, sharding), args)
  # A jitted function keeps its options; of another one `static` are constants.
  jitted: Any = fn
  if not hasattr(fn, "lower"):
    jitted, static = jax.jit(functools.partial(fn, **static)), {}
  # Lowering asks the mesh in context, not jax.devices(), what the chip is.
  with jax.set_mesh(mesh), overflow.explained():
    traced = jitted.trace(*args, **static)
    executable = topology.compiled(traced.lower())
  return _describe(chip, executable, traced.jaxpr, min_copy_bytes)


def _abstract(
    x: jax.Array | jax.ShapeDtypeStruct, sharding: NamedSharding
) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _describe(
    chip: chips.Chip,
    executable: Any,
    jaxpr: jex.core.ClosedJaxpr,
    min_copy_bytes: int,
) -> Compiled:
  memory, cost = executable.memory_analysis(), executable.cost_analysis() or {}
  text, seconds = executable.as_text(), cost.get("optimal_seconds")
  return Compiled(
      chip=chip,
      executable=executable,
      jaxpr=jaxpr,
      hlo=text,
      temp_bytes=memory.temp_size_in_bytes,
      argument_bytes=memory.argument_size_in_bytes,
      output_bytes=memory.output_size_in_bytes,
      alias_bytes=memory.alias_size_in_bytes,
      flops=cost.get("flops"),
      bytes_accessed=cost.get("bytes accessed"),
      optimal_seconds=None if seconds is None or seconds < 0 else seconds,
      copies=hlo_lib.copies(text, min_copy_bytes),
      scoped_vmem_bytes=hlo_lib.kernels(text),
  )
