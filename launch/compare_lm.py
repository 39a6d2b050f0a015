"""Draws several runs of `train_lm` in one report.

  python -m launch.compare_lm --runs=runs/a,runs/b --workdir=runs/figure6

Runs that differ in their seed alone become one curve, mean and spread. JoMA's
Figure 6 is the runs of --preset=joma_figure6 with --model.num_layers of 1, 2, 5
and 10 and several --seed; Figure 8 those of joma_figure8 with several --lr;
Figure 10 of Scan & Snap those of scansnap_figure10 with --lr from 1 to 5.
Below --workdir it writes report.html, summary.json (every number that the
figures show) and figures/.
"""

import pathlib
import time

from absl import flags

from launch import app
from launch import run
from scansnap_jax.experiment import errors

_WORKDIR = run.define_workdir("Local folder of the report.")
_RUNS = flags.DEFINE_list(
    "runs", None, "Folders of finished runs.", required=True
)
_REFERENCE_CSV = run.define_reference_csv()


def main(_: list[str]) -> None:
  """Reads the runs and writes the report."""
  started = time.monotonic()
  from joma.transformer.training import (
      report,  # Imported here, so that --help answers at once.
  )

  runs = [pathlib.Path(folder).expanduser() for folder in _RUNS.value]
  workdir = pathlib.Path(_WORKDIR.value).expanduser().absolute()
  if (workdir / "config.json").exists():
    raise errors.UserError(f"{workdir} is a run's folder. Give another one.")
  workdir.mkdir(parents=True, exist_ok=True)
  path = report.compare(
      workdir,
      runs,
      facts={"command": run.command("compare_lm")},
      started=started,
      reference_csv=_REFERENCE_CSV.value,
  )
  print(f"Report: {path}")


if __name__ == "__main__":
  app.run(main)
