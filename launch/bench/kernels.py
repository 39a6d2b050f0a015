"""Compares the attention kernels with their peers, per platform.

  python -m launch.bench.kernels --target=tpu:v5e --lengths=4096,16384

compiles our kernels and jax's flash and splash attention for a TPU that is not
there, and prints of each FLOPs, HBM bytes, roofline time, VMEM, spills and the
static schedule: bundles a grid step and of the whole kernel, which are static,
not measured. Chips: v4, v5e, v5p, v6e, v7x (extra `tpu`). Some minutes.

  --target=h100   registers, spills, shared memory of the Mosaic GPU kernels,
                  compiled without a GPU (jax >= 0.11.2 and its CUDA 13 plugin)
  --target=gpu    measures on the Hopper GPU of this machine, under ten minutes
  --target=cpu    measures the XLA implementations on this machine

  python -m launch.bench.kernels --masks --target=cpu --lengths=8192

counts pairs, FLOPs and tiles of twelve families of masks, flash and
block-sparse, and their time per pair beside dense causal attention's; on a CPU,
or as static bundles with --target=tpu:CHIP.

  python -m launch.bench.kernels --ops=delta --target=cpu --lengths=4096,16384

measures the gated delta rule, forward and backward, beside a loop by positions
and beside dense causal attention; with --target=tpu:CHIP or h100 it is
compiled.

  python -m launch.bench.kernels --update_budgets

compiles the kernels of `kernels_pallas/aot/budgets.json` with the libtpu that
is installed and writes their figures, which a test compares from then on.
"""

from collections.abc import Callable, Sequence
import importlib
import types

from absl import flags

from launch.bench import harness
from launch.command import app
from scansnap_jax.experiment import errors
from scansnap_jax.experiment.processes import devices

# Whoever imports this module for its functions gets no flags.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_TARGET = flags.DEFINE_string(
    "target", "tpu:v5e", "tpu:CHIP, h100, gpu or cpu.", flag_values=_FLAGS
)
_LENGTHS = flags.DEFINE_list(
    "lengths", ["4096"], "Sequence lengths, multiples of 1024.", _FLAGS
)
_SPARSE_LENGTH = flags.DEFINE_integer(
    "sparse_length",
    32_768,
    "Length for block-sparse attention on a TPU, a multiple of 1024; 0: none.",
    lower_bound=0,
    flag_values=_FLAGS,
)
_OPS = flags.DEFINE_multi_enum(
    "ops",
    ["attention", "mlp", "decode"],
    [
        "attention",
        "mlp",
        "decode",
        "prefill",
        "planning",
        "memory",
        "delta",
        "linear",
        "single",
    ],
    "Which ops; linear attention goes with attention; prefill, on a TPU, is"
    " attention to a tenth of a prompt, the choice included; planning, on a"
    " TPU, is what surrounds attention to blocks that data choose; memory, on a"
    " TPU, is temporary bytes of attention's two passes; delta is the gated"
    " delta rule; linear, on a CPU, is how linear attention's time grows with"
    " the lengths; single, on a CPU, is a selection of each query by itself.",
    flag_values=_FLAGS,
)
# Ops with a report of their own, on every target that they know.
_RECURRENT = ("delta", "linear")
_MASKS = flags.DEFINE_boolean(
    "masks", False, "Whether to go through mask families instead.", _FLAGS
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.", _FLAGS)
_UPDATE = flags.DEFINE_boolean(
    "update_budgets", False, "Whether to write budgets.json instead.", _FLAGS
)


def main(_: list[str]) -> None:
  """Measures, prints, writes."""
  harness.check_compiles()
  write = harness.writer(_OUTPUT.value)
  devices.set_up()
  if _UPDATE.value:
    _explained(_module("budgets").update)
    return
  lengths = [_length(text) for text in _LENGTHS.value]
  if _MASKS.value:
    write(measure_masks(_TARGET.value, lengths))
    return
  sparse_length = _SPARSE_LENGTH.value and _length(str(_SPARSE_LENGTH.value))
  write(measure(_TARGET.value, lengths, sparse_length, _OPS.value))


def measure(
    target: str,
    lengths: list[int],
    sparse_length: int = 0,
    ops: Sequence[str] = ("attention",),
) -> list[harness.Row]:
  """Prints the report of a target; returns its rows.

  Args:
    target: tpu:CHIP, h100 (or gpu:h100), gpu, or cpu.
    lengths: Of TPU programs.
    sparse_length: Of block-sparse ones; 0 is none.
    ops: Which ops.

  Raises:
    UserError: If the target is unknown or its compiler is not installed.
  """
  for op in _RECURRENT:
    if op in ops:
      others = [other for other in ops if other != op]
      report = importlib.import_module(f"launch.bench.recurrent.{op}").report
      rows = _explained(report, target, lengths)
      return rows + measure(target, lengths, sparse_length, others)
  if not ops:
    return []
  platform, _, name = target.partition(":")
  if target in ("h100", "gpu:h100"):
    return _explained(_module("h100").report, ops)
  if target in ("cpu", "gpu"):
    return _explained(_module(target).report, ops)
  if platform != "tpu" or not name:
    raise errors.UserError(
        f"--target={target} must be tpu:CHIP, h100, gpu or cpu"
    )
  return _explained(_module("tpu").report, name, lengths, sparse_length, ops)


def measure_masks(target: str, lengths: list[int]) -> list[harness.Row]:
  """Prints what mask families cost on a target; returns its rows.

  Args:
    target: cpu or tpu:CHIP.
    lengths: T.

  Raises:
    UserError: If the target is none of them, or its compiler is not installed.
  """
  platform, _, chip = target.partition(":")
  if target != "cpu" and not (platform == "tpu" and chip):
    raise errors.UserError(
        f"--masks knows --target=cpu and tpu:CHIP, got {target}"
    )
  report = importlib.import_module("launch.bench.masks.report").report
  return _explained(report, target, lengths)


def _module(name: str) -> types.ModuleType:
  """Imports on demand: each has needs of its own."""
  return importlib.import_module(f"launch.bench.ops.{name}")


def _explained(
    call: Callable[..., list[harness.Row]], *arguments: object
) -> list[harness.Row]:
  """Calls; a missing compiler or unknown chip becomes a UserError."""
  from kernels_pallas.aot import topology

  try:
    return call(*arguments)
  except (ValueError, topology.ToolchainMissing) as error:
    raise errors.UserError(str(error)) from error


def _length(text: str) -> int:
  if not text.isdecimal() or int(text) < 1024 or int(text) % 1024:
    raise errors.UserError(f"length {text} must be a multiple of 1024")
  return int(text)


if __name__ == "__main__":
  app.run(main, keeps_compiled=False)
