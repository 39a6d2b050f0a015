r"""Says what is best to lie in a host's memory when one chip decodes.

  python -m launch.plan.offload --shape=opt_30b --chip=v5e --host_gb=192 \
      --link_gbs=32 --seq_len=1024 --workdir=runs/offload

Weights and caches go to the host layer by layer, the residual stream as a
whole; of all placements and batches the one of most tokens per second is found,
beside the best of those that may use less of the host. Formulas at the peaks of
chip and link: nothing is measured. Below --workdir, if there is one:
summary.json, report.html, offload.png, flags.txt, config.json.
"""

import functools
from typing import Any

from rich import box
from rich import console as rich_console
from rich import table as rich_table

from joma.scale.offload import offload_config
from launch.command import app
from launch.command import flag_config
from launch.command import run
from scansnap_jax.experiment import workdir as workdir_lib

_WORKDIR = run.define_workdir(
    "Local folder of this run; none writes no file.", is_required=False
)
_CONFIG = flag_config.define(offload_config.OffloadConfig())
_WIDTH = 160


def main(_: list[str]) -> None:
  """Searches, prints, draws, writes."""
  config = _CONFIG()
  folder = functools.partial(_folder, config) if _WORKDIR.value else None
  with run.start("plan.offload", folder, check=config.work) as this:
    # Imported here, so that --help and wrong flags answer at once.
    from joma.scale.offload import plan
    from joma.scale.offload import report as offload_report
    from scansnap_jax.experiment import report as reports

    summary = plan.make(config)
    _show(offload_report.table(summary))
    print(*summary["finding"], sep="\n")

    def write() -> Any:
      if this.workdir is None:
        return None
      facts = {**this.facts, **reports.run_facts(this.started)}
      return offload_report.write(this.workdir, summary, facts)

    this.finish(write)


def _folder(config: offload_config.OffloadConfig) -> run.Folder:
  return run.Folder(
      _WORKDIR.value,
      workdir_lib.config_to_json(config),
      flag_config.to_flagfile(config, {}),
  )


def _show(table: Any) -> None:
  drawn = rich_table.Table(title=table.caption, box=box.SIMPLE_HEAD)
  for number, name in enumerate(table.header):
    drawn.add_column(name, justify="right" if number else "left")
  for row in table.rows:
    drawn.add_row(*row)
  sheet = rich_console.Console(width=_WIDTH, markup=False, emoji=False)
  with sheet.capture() as text:
    sheet.print(drawn)
  print(text.get(), end="")


if __name__ == "__main__":
  app.run(main)
