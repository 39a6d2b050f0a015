"""What leaving neurons out costs in perplexity, and what it saves in time.

  python -m launch.contextual_sparsity --model=SmolLM2-135M --with_rules=false \
      --methods=oracle,oracle:even:16,oracle:even:32,oracle:even:64 \
      --budgets=0.25,0.5,0.75 --workdir=RUN
  python -m launch.bench.language.sparsity_times --run=RUN --figures=DIR

Takes the perplexities of a finished run, of oracles that choose blocks of
neurons, and times what reads as many blocks: on this machine, float32, with the
dense MLP in turns, and by the static schedule of the kernel for TPU chips, as
`launch.bench.kernels` does. A text a step; an MLP of SmolLM2-135M's sizes. The
scores by which anything else than an oracle chooses come on top.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

from absl import flags
import numpy as np

from joma.inference.sparsity.gated import spec as specs
from kernels_pallas.aot import chips
from kernels_pallas.aot import topology
from kernels_pallas.gather_mlp import shapes
from launch.bench import harness
from launch.bench.ops import cpu
from launch.bench.ops import mlp_tpu
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import figures
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import require

_SHAPE = "smollm2_135m_{}"
_HERE = "this machine"
# The kernel's least; rows of a tile.
_LEAST_BLOCK = 16
_COLUMNS: harness.Columns = {
    "where": ("where", str),
    "block": ("block", str),
    "share": ("neurons", "{:.0%}".format),
    "times_dense": ("time, of dense", "{:.2f}".format),
    "change": ("perplexity", "{:+.1%}".format),
    "change_low": ("from", "{:+.1%}".format),
    "change_high": ("to", "{:+.1%}".format),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """What is timed.

  Attributes:
    chips: TPU chips whose static schedule is read; empty leaves them out.
    num_times: Calls of each program on this machine.
  """

  chips: tuple[str, ...] = ("v5e", "v6e")
  num_times: int = 50

  def __post_init__(self):
    require.at_least("num_times", self.num_times, 1)
    for name in self.chips:
      if name not in chips.TPU_NAMES:
        raise errors.UserError(
            f"chips={name} must be of {', '.join(chips.TPU_NAMES)}."
        )


def measure(run: str, folder: str | None, config: BenchConfig) -> harness.Row:
  """Prints, draws and returns a row for each place, block and share.

  Args:
    run: Workdir of `launch.contextual_sparsity`.
    folder: Where times.png, .pdf and .csv go; None draws nothing.
    config: What is timed.

  Raises:
    UserError: The run is not finished or has no row of an oracle, or the
      compiler is not installed.
  """
  known = read(pathlib.Path(run))
  blocks = sorted({row["block"] for row in known})
  shares = sorted({row["share"] for row in known})
  times = {_HERE: _here(blocks, shares, config.num_times)}
  for name in config.chips:
    times[name] = _static(chips.get_chip(name), blocks, shares)
  rows = [
      row | {"where": where, "times_dense": found[row["block"], row["share"]]}
      for where, found in times.items()
      for row in known
      if (row["block"], row["share"]) in found
  ]
  print(harness.table(_COLUMNS, rows))
  if folder is not None:
    figures.save(draw(rows), pathlib.Path(folder), "times")
  return {"rows": rows}


def read(run: pathlib.Path) -> list[dict[str, Any]]:
  """Returns block, share and change of perplexity of a run's oracles."""
  path = run / "summary.json"
  if not path.exists():
    raise errors.UserError(
        f"--run={run} has no summary.json: give the workdir of a finished"
        " launch.contextual_sparsity."
    )
  rows = []
  for row in json_file.read_object(path).get("methods", []):
    name = row["rule"]
    spec = None if name == "dense" else specs.parse(name)
    if spec is None or spec.name != "oracle" or spec.spread != "even":
      continue
    changes = {k: row[k] for k in ("change", "change_low", "change_high")}
    rows.append({"block": spec.block_size, "share": row["share"], **changes})
  if not rows:
    raise errors.UserError(
        f"--run={run} measured no oracle: give --methods=oracle:even:32, or"
        " another number of neurons, to launch.contextual_sparsity."
    )
  missing = {row["block"] for row in rows} - {
      shape.block_size
      for name, shape in shapes.BENCHMARKS.items()
      if name == _SHAPE.format(shape.block_size)
  }
  if missing:
    raise errors.UserError(
        f"--run={run} has blocks of {min(missing)} neurons; there are times of"
        " 1, 16, 32, 64 and 128."
    )
  return rows


def _here(
    blocks: Sequence[int], shares: Sequence[float], num_times: int
) -> dict[tuple[int, float], float]:
  """Time by that of the dense MLP, which is measured beside each."""
  found = {}
  for block in blocks:
    for share in shares:
      name = _SHAPE.format(block)
      row = cpu.mlp_row(name, density=share, num_times=num_times)
      harness.tell(f"{row['what']}, blocks of {block}", row)
      found[block, share] = row["ratio"]
  return found


def _static(
    chip: chips.Chip, blocks: Sequence[int], shares: Sequence[float]
) -> dict[tuple[int, float], float]:
  """The same by static schedules, of blocks that the kernel takes."""
  names = {_SHAPE.format(b): b for b in blocks if b >= _LEAST_BLOCK}
  try:
    rows = mlp_tpu.measure(chip, tuple(names), densities=shares)
  except topology.ToolchainMissing as error:
    raise errors.UserError(str(error)) from error
  dense = {r["shape"]: r["time_us"] for r in rows if "density" not in r}
  found = {}
  for name, block in names.items():
    own = [r for r in rows if r["shape"] == name and "density" in r]
    for share, row in zip(shares, own, strict=True):
      found[block, share] = row["time_us"] / dense[name]
  return found


def draw(rows: Sequence[Mapping[str, Any]]) -> Any:
  """Returns a figure of perplexity against time, a panel a place."""
  places = list(dict.fromkeys(row["where"] for row in rows))
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.6)
    panels = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
    sizes = sorted({float(row["block"]) for row in rows})
    styles = figures.curve_styles(sizes)
    for axes, place in zip(panels, places, strict=True):
      for block in sizes:
        look = styles[block]
        own = [
            row
            for row in rows
            if (row["where"], row["block"]) == (place, block)
        ]
        if not own:
          continue
        own = sorted(own, key=lambda row: row["share"])
        x, y, low, high = (
            np.array([row[key] for row in own])
            for key in ("times_dense", "change", "change_low", "change_high")
        )
        label = "1 neuron" if block == 1 else f"{block:g} neurons"
        axes.plot(x, 1 + y, **look._asdict(), label=label)
        figures.shade(axes, x, 1 + low, 1 + high, look)
      axes.plot(1, 1, marker="*", color="black", linestyle="", label="dense")
      axes.set(xlabel="time / dense", yscale="log", title=place)
      axes.set_xlim(left=0)
      axes.locator_params(axis="x", nbins=4)
    panels[0].set_ylabel("perplexity / dense")
    figures.put_legend_above(figure, figures.legend_entries(panels[0]))
  return figure


if __name__ == "__main__":
  _RUN = flags.DEFINE_string(
      "run",
      None,
      "Workdir of a finished launch.contextual_sparsity with methods"
      " oracle:even:B, whose perplexities are taken.",
      required=True,
  )
  _FIGURES = flags.DEFINE_string(
      "figures", None, "Folder for a figure of perplexity against time."
  )
  harness.run(
      BenchConfig(), lambda config: measure(_RUN.value, _FIGURES.value, config)
  )
