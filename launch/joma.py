"""Runs one study of JoMA, from flags to a report.

  python -m launch.joma --preset=figure4 --workdir=runs/figure4

Each preset is one figure, theorem or open question of JoMA
(https://arxiv.org/abs/2310.00535); `--help` lists them with their flags. The
flags of a preset begin with the name of its study, as `--figure4.step_size`.
Below --workdir it writes report.html, summary.json (every number that the
figure shows), figures/, metrics.jsonl, flags.txt, config.json and, for studies
that train for long, checkpoints/. The same command continues an interrupted
run; --flagfile=OLD/flags.txt --workdir=NEW repeats one.
"""

import pathlib
from typing import Any

from absl import flags

from joma.hierarchy import config as table1_config
from joma.studies.figures import figure2
from joma.studies.figures import figure3
from joma.studies.figures import figure4
from joma.studies.figures import table1
from joma.studies.questions import bounce
from joma.studies.questions import drift
from joma.studies.questions import joint_invariant
from joma.studies.questions import linear_control
from joma.studies.questions import noisy_hblt
from joma.studies.questions import residual
from joma.studies.questions import two_layer_hblt
from joma.studies.theorems import convergence
from joma.studies.theorems import entropy_bounce
from joma.studies.theorems import erf
from joma.studies.theorems import hblt
from joma.studies.theorems import invariants
from joma.studies.theorems import stable_rank
from launch import app
from launch import flag_config
from launch import run
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import workdir as workdir_lib

_STUDIES = {
    "figure2": figure2.STUDY,
    "figure3": figure3.STUDY,
    "figure4": figure4.STUDY,
    "invariants": invariants.STUDY,
    "erf": erf.STUDY,
    "convergence": convergence.STUDY,
    "entropy_bounce": entropy_bounce.STUDY,
    "hblt": hblt.STUDY,
    "stable_rank": stable_rank.STUDY,
    "table1": table1.STUDY,
    "bounce": bounce.STUDY,
    "linear_control": linear_control.STUDY,
    "joint_invariant": joint_invariant.STUDY,
    "drift": drift.STUDY,
    "residual": residual.STUDY,
    "two_layer_hblt": two_layer_hblt.STUDY,
    "noisy_hblt": noisy_hblt.STUDY,
}
# Presets are the studies, and these with settings of their own.
_VARIANTS = {"table1_reduced": ("table1", table1_config.table1_reduced())}

_WORKDIR = run.define_workdir()
_PRESET = flags.DEFINE_enum(
    "preset", "figure4", [*_STUDIES, *_VARIANTS], "What to run."
)
_MULTIHOST = run.define_multihost()
_NUM_CPU_DEVICES = run.define_num_cpu_devices()
_CONFIGS = {
    name: flag_config.define(study.config, prefix=f"{name}.")
    for name, study in _STUDIES.items()
}


def main(_: list[str]) -> None:
  """Runs the study and writes the report."""
  name, base = _VARIANTS.get(_PRESET.value, (_PRESET.value, None))
  _check_flags(name)
  study, config = _STUDIES[name], _CONFIGS[name](base)

  with run.start(
      "joma",
      lambda: _folder(name, config),
      multihost=_MULTIHOST.value,
      num_cpu_devices=_NUM_CPU_DEVICES.value,
  ) as this:
    summary = study.measure(config, this.folder)

    def report() -> pathlib.Path:
      from joma.studies import study_report

      path = study_report.write(
          this.folder, name, study, summary, this.facts, this.started
      )
      print(summary["finding"])
      return path

    this.finish(report)


def _check_flags(name: str) -> None:
  """Refuses flags of other studies, which would have no effect."""
  for other, study in _STUDIES.items():
    given = flag_config.given_to_flagfile(study.config, {}, prefix=f"{other}.")
    if given and other != name:
      raise errors.UserError(
          f"--preset={_PRESET.value} runs {name}, so that {given.split()} have"
          " no effect. Leave them out."
      )


def _folder(name: str, config: Any) -> run.Folder:
  """What makes the workdir this run's."""
  described = {
      "preset": _PRESET.value,
      name: workdir_lib.config_to_json(config),
  }
  flagfile = flag_config.to_flagfile(
      config, {"preset": _PRESET.value}, prefix=f"{name}."
  )
  return run.Folder(_WORKDIR.value, described, flagfile)


if __name__ == "__main__":
  app.run(main)
