"""Draws several runs of `train_lm` in one report.

  python -m launch.compare_lm --runs=runs/a,runs/b --workdir=runs/figure6

Runs that differ in their seed alone become one curve, mean and spread. JoMA's
Figure 6 is the runs of --preset=joma_figure6 with --model.num_layers of 1, 2, 5
and 10 and several --seed; Figure 8 those of joma_figure8 with several --lr;
Figure 10 of Scan & Snap those of scansnap_figure10 with --lr from 1 to 5.
Below --workdir it writes report.html, summary.json (every number that the
figures show) and figures/, flags.txt, config.json.
"""

from absl import flags

from launch.command import app
from launch.command import flag_config
from launch.command import run
from scansnap_jax.experiment import json_file

_WORKDIR = run.define_workdir("Local folder of the report.")
_RUNS = flags.DEFINE_string(
    "runs",
    None,
    "Folders of finished runs, with commas between.",
    required=True,
)
_REFERENCE_CSV = run.define_reference_csv()


def main(_: list[str]) -> None:
  """Reads the runs and writes the report."""
  # Imported here, so that --help and wrong flags answer at once.
  from joma.transformer.training import report

  names = json_file.split_paths(_RUNS.value)
  runs = [json_file.local_path(name) for name in names]
  check = lambda: [report.read_summary(folder) for folder in runs]
  with run.start("compare_lm", _folder, check=check) as this:
    this.finish(
        lambda: report.compare(
            this.folder,
            runs,
            facts={"command": this.facts["command"]},
            started=this.started,
            reference_csv=_REFERENCE_CSV.value,
        )
    )


def _folder() -> run.Folder:
  given = {"runs": _RUNS.value, "reference_csv": _REFERENCE_CSV.value}
  lines = flag_config.lines_of(given)
  return run.Folder(_WORKDIR.value, given, "".join(lines))


if __name__ == "__main__":
  app.run(main)
