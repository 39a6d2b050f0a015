r"""Prints what a decode step moves and takes, and when eviction pays.

  python -m launch.cost_table
  python -m launch.cost_table --preset=opt_30b --lengths=7000 --batch_sizes=1
  python -m launch.cost_table --model=DIR --chips=v5e,h100 --workdir=runs/cost
  python -m launch.cost_table --preset=smollm2_135m --chips= \
      --bandwidth_gbs=20 --peak_tflops=0.1 --weight_dtype=float32 ...

The model is a preset, over which flags such as --shape.num_kv_heads=1 are laid,
or the config.json of a Hugging Face folder. Times are the least that bandwidth
and arithmetic of a chip allow, by vendors' figures: nothing is measured. Below
--workdir, if there is one: cost_table.json (every number, of prefills too),
flags.txt, config.json.
"""

from collections.abc import Mapping
import dataclasses
import functools
import json
from typing import Any

from absl import flags
from rich import box
from rich import console as rich_console
from rich import table as rich_table

from joma.inference.cost import cost_table
from joma.inference.cost import cost_table_config
from launch.command import app
from launch.command import flag_config
from launch.command import run
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import workdir as workdir_lib

_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Folder of a model, or its name on Hugging Face, as org/name@revision; its"
    " config.json is read.",
)
_PRESET = flags.DEFINE_enum(
    "preset",
    "llama3_8b",
    [*cost_table_config.PRESETS],
    "Model that --shape flags are laid over.",
)
_WORKDIR = run.define_workdir(
    "Local folder of this run; none writes no file.",
    is_required=False,
    has_figures=False,
)
_WIDTH = 200
_CONFIG = flag_config.define(cost_table_config.CostTableConfig())


def main(_: list[str]) -> None:
  """Computes, prints, writes."""
  config = _resolve()
  result = cost_table.make(config)
  # Paths and names are printed as they are: no [red], no :smile:.
  plain = functools.partial(rich_console.Console, markup=False, emoji=False)
  # Whole rows where the output is no terminal.
  width = None if plain().is_terminal else _WIDTH
  sheet = plain(width=width)
  # `print` tells of a reader that has gone; rich would end with a status of 1.
  with sheet.capture() as rows:
    sheet.print(table(result))
  print(rows.get(), end="")
  for line in notes(config, result):
    print(line)
  if _WORKDIR.value:
    with workdir_lib.hold(
        _WORKDIR.value,
        workdir_lib.config_to_json(config),
        flag_config.to_flagfile(config, {"model": None}),
    ) as workdir:
      path = workdir / "cost_table.json"
      text = json.dumps(result, indent=2, allow_nan=False)
      workdir_lib.write_atomic(path, text + "\n")
    print(f"All numbers: {path}")


def _resolve() -> cost_table_config.CostTableConfig:
  """Lays the model of a folder or preset under the flags."""
  base = cost_table_config.CostTableConfig()
  if _MODEL.value is None:
    shape = cost_table_config.PRESETS[_PRESET.value]()
  else:
    if flags.FLAGS["preset"].present:
      raise errors.UserError("--model and --preset both name a model.")
    # Imported here: --help and presets do without jax.
    from joma.transformer.hf import pretrained

    shape = pretrained.read_config(_MODEL.value)
  return _CONFIG(dataclasses.replace(base, shape=shape))


def table(result: Mapping[str, Any]) -> rich_table.Table:
  """A row for each length, batch and policy; a column for each chip."""
  found = rich_table.Table(
      title="Least ms of a decode step, and the gain over a full cache",
      box=box.SIMPLE_HEAD,
  )
  for name in ("length", "batch", "policy", "kept", "cache GB", "GB a step"):
    is_text = name == "policy"
    found.add_column(name, justify="left" if is_text else "right")
  for name in result["chips"]:
    found.add_column(name, justify="right")
  found.add_column("verdict")
  last = None
  for row in result["rows"]:
    place = (row["length"], row["batch_size"])
    if last is not None and place != last:
      found.add_section()
    last = place
    moved = row["decode"]["weight_bytes"] + row["decode"]["cache_bytes"]
    found.add_row(
        f"{row['length']:,}",
        str(row["batch_size"]),
        row["policy"],
        "" if row["kept"] is None else f"{100 * row['kept']:g} %",
        f"{row['cache_gb']:.3g}",
        f"{moved / 1e9:.3g}",
        *(_cell(chip) for chip in row["chips"].values()),
        row["verdict"],
    )
  return found


def _cell(chip: Mapping[str, Any]) -> str:
  if not chip["fits"]:
    return "does not fit"
  if chip["speed_up"] is None:
    return f"{chip['ms']:.1f}      "
  return f"{chip['ms']:.1f} {chip['speed_up']:4.2f}x"


def notes(
    config: cost_table_config.CostTableConfig, result: Mapping[str, Any]
) -> list[str]:
  """Lines below the table: what it shows, and from which figures."""
  lines = [*result["finding"]]
  lookup = result["model"]["lookup_gb"]
  if lookup and config.counts_lookup:
    lines.append(
        f"The weights count {lookup:.2f} GB of tables of which a step reads a"
        " row for each sequence; --nocounts_lookup leaves them out of its time."
    )
  lines.append("Chips:")
  for name, chip in result["chips"].items():
    memory = chip["memory_gb"]
    memory = "memory not given" if memory is None else f"{memory:.4g} GB"
    lines.append(
        f"  {name}: {memory}, {chip['bandwidth_gbs']:g} GB/s,"
        f" {chip['peak_tflops']:g} TFLOP/s ({chip['source']})"
    )
  return lines


if __name__ == "__main__":
  app.run(main)
