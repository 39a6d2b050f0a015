"""Programs whose arrays lie as kernels want them: row after row.

Left to itself XLA turns arrays of short rows around where a program for a v5p
or v7x begins and ends, and then has to copy them.
"""

from typing import Any

import jax
from jax.experimental.layout import Format
from jax.experimental.layout import Layout
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from kernels_pallas.aot import chips
from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.aot import topology


def compile_by_row(chip: str, step: Any, *arrays: Any) -> compile_lib.Compiled:
  """Compiles a step that is given its fourth argument for good."""
  mesh = topology.device_mesh(chips.get_chip(chip))
  sharding = NamedSharding(mesh, PartitionSpec())
  by_row = lambda x: Format(Layout(tuple(range(x.ndim))), sharding)
  with jax.set_mesh(mesh):
    outputs = jax.eval_shape(step, *arrays)
  jitted = jax.jit(
      step,
      donate_argnums=3,
      in_shardings=jax.tree.map(by_row, arrays),
      out_shardings=jax.tree.map(by_row, outputs),
  )
  # The chosen slots, a few bytes, may be turned around.
  return compile_lib.compile_for(chip, jitted, *arrays, min_copy_bytes=1024)
