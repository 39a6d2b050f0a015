r"""Says how a step scales from a few chips to thousands, without any.

  python -m launch.plan.scaling --chip=v5p --shape=llama3_8b --batch=64 \
      --seq_len=8192 --workdir=runs/scaling
  python -m launch.plan.scaling --task=decode --batch=256 --seq_len=131072 \
      --policy=h2o --capacity=16384 --workdir=runs/scaling_decode

For each number of chips the mesh that formulas find fastest; the numbers of
--compiled are compiled ahead of time as launch.plan does, which takes minutes
each, and the others scaled from them. Below --workdir, if there is one:
summary.json, report.html, scaling.png, flags.txt, config.json.
"""

import functools
import sys
from typing import Any

from rich import box
from rich import console as rich_console
from rich import table as rich_table

from joma.scale.curve import curve_config
from launch.command import app
from launch.command import flag_config
from launch.command import run
from scansnap_jax.experiment import workdir as workdir_lib

_WORKDIR = run.define_workdir(
    "Local folder of this run; none writes no file.", is_required=False
)
_CONFIG = flag_config.define(curve_config.ScalingConfig())
_WIDTH = 160


def main(_: list[str]) -> None:
  """Compiles, estimates, prints, draws, writes."""
  config = _CONFIG()
  folder = functools.partial(_folder, config) if _WORKDIR.value else None
  check = config.plan(config.num_chips[0]).model
  with run.start("plan.scaling", folder, check=check) as this:
    # Imported here, so that --help and wrong flags answer at once.
    from joma.scale.curve import report as curve_report
    from joma.scale.curve import scaling
    from scansnap_jax.experiment import report as reports

    tell = lambda line: print(line, file=sys.stderr)
    summary = scaling.make(config, tell)
    _show(curve_report.table(summary))
    print(*summary["finding"], sep="\n")

    def write() -> Any:
      if this.workdir is None:
        return None
      facts = {**this.facts, **reports.run_facts(this.started)}
      return curve_report.write(this.workdir, summary, facts)

    this.finish(write)


def _folder(config: curve_config.ScalingConfig) -> run.Folder:
  return run.Folder(
      _WORKDIR.value,
      workdir_lib.config_to_json(config),
      flag_config.to_flagfile(config, {}),
  )


def _show(table: Any) -> None:
  drawn = rich_table.Table(title=table.caption, box=box.SIMPLE_HEAD)
  for name in table.header:
    drawn.add_column(name, justify="right")
  for row in table.rows:
    drawn.add_row(*row)
  sheet = rich_console.Console(width=_WIDTH, markup=False, emoji=False)
  with sheet.capture() as text:
    sheet.print(drawn)
  print(text.get(), end="")


if __name__ == "__main__":
  app.run(main)
