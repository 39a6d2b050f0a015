"""A plan: what a step holds, computes and sends on each mesh that was compiled.

The bound of a step is the slowest of arithmetic, HBM, interconnect and, between
slices, the data-centre network, each at its peak, as if the others hid behind
it. MFU at the bound is the FLOPs that the model needs over those that all
devices could do in that time.
"""

from collections.abc import Callable
import time
from typing import Any

from joma.scale import collectives as collectives_lib
from joma.scale import estimate as estimates
from joma.scale import interconnect
from joma.scale import meshes
from joma.scale import plan_config
from joma.scale import program as program_lib
from joma.scale import step as steps
from joma.scale import work as works
from joma.transformer.config import TransformerConfig
from kernels_pallas.aot import overflow
from kernels_pallas.hardware import peaks

Summary = dict[str, Any]


def make(
    config: plan_config.PlanConfig,
    on_progress: Callable[[str], None] = lambda line: None,
) -> Summary:
  """Compiles and reads off what `config` asks for.

  Args:
    config: The plan.
    on_progress: Told of each mesh before it is compiled.

  Returns:
    Plain JSON types: `question`, the devices and the model; `meshes`, one a
    compiled mesh, best first; `estimates`, all that were ranked; `finding`,
    sentences.

  Raises:
    UserError: The mesh does not divide, or there is no such topology.
  """
  model = config.model()
  refused = 0
  if config.mesh == "search":
    ranking = meshes.rank(config, model)
    ranked, refused = ranking.best, ranking.num_refused
  else:
    meshes.check(config, model, config.sizes)
    ranked = (estimates.of_mesh(config, model, config.sizes),)
  compiled = []
  for number, guess in enumerate(ranked[: config.num_compiled]):
    name = mesh_name(guess.mesh)
    on_progress(f"compiling mesh {name} ({number + 1} of those to compile)")
    compiled.append(of_mesh(config, model, guess))
  # Of those that take as long, the one that the others hide best behind.
  serial = lambda one: one.get("serial_seconds", one["bound_seconds"])
  compiled.sort(
      key=lambda one: (not one["fits"], one["bound_seconds"], serial(one))
  )
  return {
      "question": _question(config, model),
      "meshes": compiled,
      "estimates": [_guess(one) for one in ranked],
      "finding": findings(config, compiled, len(ranked), refused),
  }


def mesh_name(mesh: dict[str, int]) -> str:
  """Such as data 1 x fsdp 16 x tensor 4."""
  return " x ".join(f"{name} {size}" for name, size in mesh.items())


def _question(
    config: plan_config.PlanConfig, model: TransformerConfig
) -> Summary:
  peak = peaks.PEAKS[config.chip]
  return {
      "topology": config.topology,
      "num_slices": config.num_slices,
      "num_devices": config.num_devices,
      "shape": config.shape,
      "task": config.task,
      "batch": config.batch,
      "seq_len": config.seq_len,
      "hbm_bytes": peak.hbm_bytes // peak.num_devices,
      "peak_flops": peak.flops_per_sec / peak.num_devices,
      "hbm_bytes_per_sec": peak.bytes_per_sec / peak.num_devices,
      "ici_bytes_per_sec": peak.ici_bytes_per_sec / peak.num_devices,
      "dcn_bytes_per_sec": peak.dcn_bytes_per_sec / peak.num_devices,
      "model_flops": estimates.model_flops(config, model),
  }


def of_mesh(
    config: plan_config.PlanConfig,
    model: TransformerConfig,
    guess: estimates.Estimate,
) -> Summary:
  """Compiles a step on a mesh and says what it costs."""
  started = time.monotonic()
  sizes = tuple(guess.mesh.values())
  found: Summary = {"mesh": guess.mesh, "estimate": _guess(guess)}
  try:
    step = steps.compile_step(config, model, sizes)
  except overflow.OutOfHbm as error:
    return found | {
        "fits": False,
        "reason": str(error).splitlines()[0],
        # Of what does not fit the compiler says no more than how much it is.
        "bytes": {"needed": error.used_bytes},
        "held_bytes": error.used_bytes,
        "hbm_bytes": error.limit_bytes,
        "activation_bytes": guess.activation_bytes,
        "bound_seconds": guess.seconds,
        "compile_seconds": time.monotonic() - started,
    }
  seconds = time.monotonic() - started
  program = program_lib.parse(step.text)
  return (
      found
      | _memory(config, step, guess)
      | _times(config, model, program, guess.mesh)
      | {"compile_seconds": seconds, "xla_flops": step.xla_flops}
  )


def _memory(
    config: plan_config.PlanConfig, step: steps.Step, guess: estimates.Estimate
) -> Summary:
  peak = peaks.PEAKS[config.chip]
  room = peak.hbm_bytes // peak.num_devices
  return {
      "bytes": (
          step.part_bytes
          | {
              "padding": step.argument_bytes - sum(step.part_bytes.values()),
              "temporaries": step.temp_bytes,
              "outputs": step.output_bytes,
              "program": step.code_bytes,
          }
      ),
      "activation_bytes": guess.activation_bytes,
      "held_bytes": step.held_bytes,
      "host_bytes": step.host_bytes,
      "hbm_bytes": room,
      "fits": step.held_bytes <= room,
  }


def _times(
    config: plan_config.PlanConfig,
    model: TransformerConfig,
    program: program_lib.Program,
    mesh: dict[str, int],
) -> Summary:
  peak = peaks.PEAKS[config.chip]
  torus = interconnect.Torus(config.chip, config.sides, config.num_slices)
  work = works.count(program)
  exchanges = _exchanges(
      collectives_lib.find(program, config.num_devices), torus, mesh
  )
  seconds = {
      "compute": work.flops * peak.num_devices / peak.flops_per_sec,
      "HBM": work.hbm_bytes * peak.num_devices / peak.bytes_per_sec,
      "ICI": sum(one["seconds"] for one in exchanges),
  }
  if config.num_slices > 1:
    seconds["DCN"] = sum(one["dcn_seconds"] for one in exchanges)
  bound = max(seconds, key=lambda name: seconds[name])
  able = config.num_devices * peak.flops_per_sec / peak.num_devices
  needed = estimates.model_flops(config, model)
  return {
      "flops": work.flops,
      "kernel_flops": work.kernel_flops,
      "moved_bytes": work.hbm_bytes,
      "unknown_loops": list(work.unknown_loops),
      "silent_kernels": work.silent_kernels,
      "collectives": exchanges,
      "seconds": seconds,
      "bound": bound,
      "bound_seconds": seconds[bound],
      "serial_seconds": sum(seconds.values()),
      "mfu": needed / (able * seconds[bound]),
  }


def _exchanges(
    found: tuple[collectives_lib.Collective, ...],
    torus: interconnect.Torus,
    mesh: dict[str, int],
) -> list[Summary]:
  """A row for each kind and set of axes, the slowest first."""
  rows: dict[tuple[str, str], Summary] = {}
  for one in found:
    axes = "+".join(one.axes(mesh))
    fresh = {
        "kind": one.kind,
        "axes": axes,
        "number": 0,
        "bytes": 0,
        "sent_bytes": 0.0,
        "seconds": 0.0,
        "dcn_seconds": 0.0,
    }
    row = rows.setdefault((one.kind, axes), fresh)
    row["number"] += one.times
    row["bytes"] += one.times * one.num_bytes
    row["sent_bytes"] += one.sent_bytes
    widest = max(one.groups, key=lambda group: len(set(group)))
    ici_seconds, dcn_seconds = torus.seconds(one.sent_bytes, widest)
    row["seconds"] += ici_seconds
    row["dcn_seconds"] += dcn_seconds
  slowest = lambda row: -max(row["seconds"], row["dcn_seconds"])
  return sorted(rows.values(), key=slowest)


def _guess(one: estimates.Estimate) -> Summary:
  return {
      "mesh": one.mesh,
      "seconds": one.seconds,
      "compute_seconds": one.compute_seconds,
      "hbm_seconds": one.hbm_seconds,
      "ici_seconds": one.ici_seconds,
      "dcn_seconds": one.dcn_seconds,
      "sent_bytes": one.ici_bytes,
      "held_bytes": one.held_bytes,
      "fits": one.fits,
  }


def findings(
    config: plan_config.PlanConfig,
    compiled: list[Summary],
    num_ranked: int,
    num_refused: int,
) -> list[str]:
  """What came out, and what was not tried, in sentences."""
  best = compiled[0]
  lines = []
  if best["fits"]:
    lines.append(
        f"Of the compiled meshes, {mesh_name(best['mesh'])} is the fastest that"
        f" fits: {1e3 * best['bound_seconds']:.4g} ms a step at the least, by"
        f" {best['bound']}, where MFU would be {100 * best['mfu']:.3g} %."
    )
  else:
    lines.append("No mesh that was compiled fits into HBM.")
  parts = best["mesh"]["data"] * best["mesh"]["fsdp"]
  if config.batch % parts:
    lines.append(
        f"batch={config.batch} does not divide over data x fsdp = {parts}:"
        " every device holds all sequences."
    )
  left = num_ranked - len(compiled)
  if config.mesh == "search":
    lines.append(
        f"Not compiled: {left} more meshes with worse estimates. Not"
        f" considered: {num_refused} that do not divide model or batch, other"
        " batches, accumulated gradients, other values of remat, and"
        " pipelines."
    )
  loops = sum(len(one.get("unknown_loops", ())) for one in compiled)
  if loops:
    lines.append(
        f"{loops} loops do not say how often they run and count once: FLOPs,"
        " bytes and times are lower bounds."
    )
  if silent := max(one.get("silent_kernels", 0) for one in compiled):
    lines.append(
        f"{silent} Pallas kernels for GPUs declare no FLOPs, which therefore"
        " lack those of attention: compute times are lower bounds."
    )
  return lines
