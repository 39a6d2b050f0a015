r"""Says what a step costs on TPUs or GPUs, and whether it fits, without one.

  python -m launch.plan --topology=v5p:4x4x4 --shape=llama3_8b --task=train \
      --batch=64 --seq_len=8192 --mesh=search --workdir=runs/plan
  python -m launch.plan --topology=v5e:4x4 --shape=FOLDER --task=decode \
      --batch=32 --seq_len=32768 --mesh=2,1,8 --policy=h2o --capacity=4096

The real step of training or decoding is compiled ahead of time for the
topology, and read off the program: bytes a device holds, FLOPs, collectives by
kind and mesh axis, and the least time that the chip's peaks allow. Nothing is
measured. Below --workdir, if there is one: summary.json, report.html, plan.png,
flags.txt, config.json.
"""

from collections.abc import Mapping
import functools
import sys
from typing import Any

from rich import box
from rich import console as rich_console
from rich import table as rich_table

from joma.scale import plan_config
from launch.command import app
from launch.command import flag_config
from launch.command import run
from scansnap_jax.experiment import workdir as workdir_lib

_WORKDIR = run.define_workdir(
    "Local folder of this run; none writes no file.", is_required=False
)
_WIDTH = 160
_CONFIG = flag_config.define(plan_config.PlanConfig())


def main(_: list[str]) -> None:
  """Compiles, prints, draws, writes."""
  config = _CONFIG()
  folder = functools.partial(_folder, config) if _WORKDIR.value else None
  with run.start("plan", folder, check=config.model) as this:
    # Imported here, so that --help and wrong flags answer at once.
    from joma.scale import plan
    from joma.scale import report
    from scansnap_jax.experiment import report as reports

    tell = lambda line: print(line, file=sys.stderr)
    summary = plan.make(config, tell)
    show(summary)

    def write() -> Any:
      if this.workdir is None:
        return None
      facts = {**this.facts, **reports.run_facts(this.started)}
      return report.write(this.workdir, summary, facts)

    this.finish(write)


def _folder(config: plan_config.PlanConfig) -> run.Folder:
  return run.Folder(
      _WORKDIR.value,
      workdir_lib.config_to_json(config),
      flag_config.to_flagfile(config, {}),
  )


def show(summary: Mapping[str, Any]) -> None:
  """Prints the tables of a plan."""
  from joma.scale import report

  tables = [report.bytes_table(summary), report.times_table(summary)]
  tables += [report.collectives_table(row) for row in summary["meshes"]]
  # Names are printed as they are: no [red], no :smile:.
  plain = functools.partial(rich_console.Console, markup=False, emoji=False)
  sheet = plain(width=None if plain().is_terminal else _WIDTH)
  # `print` tells of a reader that has gone; rich would end with a status of 1.
  with sheet.capture() as text:
    for table in tables:
      drawn = rich_table.Table(title=table.caption, box=box.SIMPLE_HEAD)
      for number, name in enumerate(table.header):
        drawn.add_column(name, justify="right" if number else "left")
      for row in table.rows:
        drawn.add_row(*map(str, row))
      sheet.print(drawn)
  print(text.get(), end="")
  for line in summary["finding"]:
    print(line)


if __name__ == "__main__":
  app.run(main)
