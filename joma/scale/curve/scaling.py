"""A step on more and more chips: what devices send, and where it stops to pay.

The batch stays, so that arithmetic falls as 1 / n. What fsdp gathers does not:
every device gets every weight, however many there are. For each number of chips
the mesh is the one that formulas find fastest; some are compiled, and the
others are what formulas say, times what the program had of the formulas' at the
largest number below that was compiled (or at the smallest of all). Nothing is
measured.
"""

from collections.abc import Callable
import math
from typing import Any

from joma.scale import estimate as estimates
from joma.scale import meshes
from joma.scale import plan
from joma.scale.curve import curve_config
from kernels_pallas.hardware import peaks
from scansnap_jax.experiment import errors

Summary = dict[str, Any]
_KINDS = ("flops", "hbm_bytes", "sent_bytes")


def make(
    config: curve_config.ScalingConfig,
    on_progress: Callable[[str], None] = lambda line: None,
) -> Summary:
  """Compiles and estimates.

  Args:
    config: The curve.
    on_progress: Told of each slice before it is compiled.

  Returns:
    Plain JSON types: `question`, `rows` of `num_chips`, `mesh`, `is_compiled`,
    `flops`, `hbm_bytes` and `sent_bytes` of a device, `seconds` by what they
    go over, `bound`, `bound_seconds`, `mfu`, the FLOPs that the model needs
    over those that all could do in that time, and `efficiency`, the work of a
    chip in a second over that on the fewest chips; and `finding`, sentences.

  Raises:
    UserError: No mesh divides at any number of chips.
  """
  model = config.plan(config.num_chips[0]).model()
  rows, ratios = [], {}
  for number in config.num_chips:
    asked = config.plan(number)
    try:
      guess = meshes.rank(asked, model).best[0]
    except errors.UserError as error:
      on_progress(f"{number} chips: {error}")
      continue
    row = _estimated(config, number, guess)
    if number in config.compiled:
      on_progress(f"compiling {asked.topology}, {plan.mesh_name(guess.mesh)}")
      found = plan.of_mesh(asked, model, guess)
      if "flops" in found:
        ratios[number] = _read(row, found)
      else:
        row["reason"] = found["reason"]
    rows.append(row)
  if not rows:
    raise errors.UserError(
        "no mesh divides model and batch at any of num_chips."
    )
  for row in rows:
    if not row["is_compiled"] and ratios:
      _scale(row, _nearest(ratios, row["num_chips"]))
    needed = estimates.model_flops(config.plan(row["num_chips"]), model)
    _bound(row, needed, rows[0])
  return {
      "question": {
          "chip": config.chip,
          "shape": config.shape,
          "task": config.task,
          "batch": config.batch,
          "seq_len": config.seq_len,
          "capacity": config.capacity,
      },
      "rows": rows,
      "ratios": {str(n): ratio for n, ratio in ratios.items()},
      "finding": findings(config, rows),
  }


def _estimated(
    config: curve_config.ScalingConfig,
    number: int,
    guess: estimates.Estimate,
) -> Summary:
  return {
      "num_chips": number,
      "topology": curve_config.topology(config.chip, number),
      "mesh": guess.mesh,
      "is_compiled": False,
      "fits": guess.fits,
      "held_bytes": guess.held_bytes,
      "flops": guess.flops,
      "hbm_bytes": guess.hbm_bytes,
      "sent_bytes": sum(guess.ici_bytes.values()),
      "seconds": {
          "compute": guess.compute_seconds,
          "HBM": guess.hbm_seconds,
          "ICI": guess.ici_seconds,
      },
      "peak_flops": _peak_flops(config.chip),
  }


def _peak_flops(chip: str) -> float:
  """Of one device."""
  return peaks.PEAKS[chip].flops_per_sec / peaks.PEAKS[chip].num_devices


def _read(row: Summary, found: Summary) -> dict[str, float]:
  """Puts what was compiled into a row; returns it over what formulas say."""
  new = {
      "flops": found["flops"],
      "hbm_bytes": found["moved_bytes"],
      "sent_bytes": sum(one["sent_bytes"] for one in found["collectives"]),
  }
  times = zip(row["seconds"], _KINDS, strict=True)
  ratio = {kind: new[kind] / row[kind] if row[kind] else 1.0 for kind in new}
  ratio |= {
      name: found["seconds"][name] / row["seconds"][name]
      for name, _ in times
      if row["seconds"][name]
  }
  row |= new | {
      "is_compiled": True,
      "fits": found["fits"],
      "held_bytes": found["held_bytes"],
      "seconds": found["seconds"],
      "compile_seconds": found["compile_seconds"],
  }
  return ratio


def _nearest(ratios: dict[int, Any], number: int) -> dict[str, float]:
  below = [n for n in ratios if n <= number]
  return ratios[max(below) if below else min(ratios)]


def _scale(row: Summary, ratio: dict[str, float]) -> None:
  for kind in _KINDS:
    row[kind] *= ratio[kind]
  row["seconds"] = {
      name: seconds * ratio.get(name, 1.0)
      for name, seconds in row["seconds"].items()
  }


def _bound(row: Summary, needed: int | float, first: Summary) -> None:
  """Adds what bounds a step, and how well chips are used."""
  seconds = row["seconds"]
  row["bound"] = max(seconds, key=lambda name: seconds[name])
  row["bound_seconds"] = seconds[row["bound"]]
  devices = math.prod(row["mesh"].values())
  able = devices * row["peak_flops"] * row["bound_seconds"]
  row["mfu"] = needed / able
  cost = lambda one: one["num_chips"] * one["bound_seconds"]
  row["efficiency"] = cost(first) / cost(row)


def findings(
    config: curve_config.ScalingConfig, rows: list[Summary]
) -> list[str]:
  """Where the curve bends, and why, in sentences."""
  last = [row for row in rows if row["efficiency"] >= 0.5][-1]
  lines = [
      f"Up to {last['num_chips']} chips a chip does half or more of what it"
      f" does on {rows[0]['num_chips']}: {100 * last['efficiency']:.3g} %"
      " there."
  ]
  first = rows[0]["bound"]
  turned = next((row for row in rows if row["bound"] != first), None)
  if turned is not None:
    lines.append(
        f"The knee is at {turned['num_chips']} chips, where {turned['bound']}"
        f" takes longer than {first}:"
        f" {1e3 * turned['seconds'][turned['bound']]:.3g} against"
        f" {1e3 * turned['seconds'][first]:.3g} ms. A device sends"
        f" {turned['sent_bytes'] / 1e9:.3g} GB there and"
        f" {rows[0]['sent_bytes'] / 1e9:.3g} GB on {rows[0]['num_chips']}"
        f" chips, and computes {turned['flops'] / rows[0]['flops']:.3g} of what"
        " it did."
    )
  missing = [
      n for n in config.num_chips if n not in {r["num_chips"] for r in rows}
  ]
  if missing:
    lines.append(
        "No mesh divides model and batch on"
        f" {', '.join(map(str, missing))} chips."
    )
  compiled = [str(row["num_chips"]) for row in rows if row["is_compiled"]]
  lines.append(
      f"Compiled: {', '.join(compiled) or 'no number of'} chips; the others are"
      " formulas, times what the nearest compiled program had of them."
  )
  return lines
