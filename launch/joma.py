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

from joma import config as config_lib
from joma import question_config
from joma.hierarchy import config as table1_config
from launch import app
from launch import flag_config
from launch import run
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import workdir as workdir_lib

_STUDIES: dict[str, Any] = {
    "figure2": config_lib.Figure2Config(),
    "figure3": config_lib.Figure3Config(),
    "figure4": config_lib.Figure4Config(),
    "invariants": config_lib.InvariantsConfig(),
    "erf": config_lib.ErfConfig(),
    "convergence": config_lib.ConvergenceConfig(),
    "entropy_bounce": config_lib.EntropyBounceConfig(),
    "hblt": config_lib.HbltConfig(),
    "stable_rank": config_lib.StableRankConfig(),
    "table1": table1_config.table1(),
    "bounce": question_config.BounceConfig(),
    "linear_control": question_config.LinearControlConfig(),
    "joint_invariant": question_config.JointInvariantConfig(),
    "drift": question_config.DriftConfig(),
    "residual": question_config.ResidualConfig(),
    "two_layer_hblt": question_config.TwoLayerHbltConfig(),
    "noisy_hblt": question_config.NoisyHbltConfig(),
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
    study: flag_config.define(default, prefix=f"{study}.")
    for study, default in _STUDIES.items()
}


def main(_: list[str]) -> None:
  """Runs the study and writes the report."""
  study, base = _VARIANTS.get(_PRESET.value, (_PRESET.value, None))
  _check_flags(study)
  config = _CONFIGS[study](base)

  def measure(this: run.Run) -> dict[str, Any]:
    from launch import joma_studies

    return joma_studies.STUDIES[study].measure(config, this.folder)

  def report(this: run.Run, summary: dict[str, Any]) -> pathlib.Path:
    from launch import report_joma

    path = report_joma.write(
        this.folder, study, summary, this.facts, this.started
    )
    print(summary["finding"])
    return path

  run.run(
      "joma",
      lambda: _folder(study, config),
      measure=measure,
      report=report,
      multihost=_MULTIHOST.value,
      num_cpu_devices=_NUM_CPU_DEVICES.value,
  )


def _check_flags(study: str) -> None:
  """Refuses flags of other studies, which would have no effect."""
  for other, default in _STUDIES.items():
    given = flag_config.given_to_flagfile(default, {}, prefix=f"{other}.")
    if given and other != study:
      raise errors.UserError(
          f"--preset={_PRESET.value} runs {study}, so that {given.split()} have"
          " no effect. Leave them out."
      )


def _folder(study: str, config: Any) -> run.Folder:
  """What makes the workdir this run's."""
  described = {
      "preset": _PRESET.value,
      study: workdir_lib.config_to_json(config),
  }
  flagfile = flag_config.to_flagfile(
      config, {"preset": _PRESET.value}, prefix=f"{study}."
  )
  return run.Folder(_WORKDIR.value, described, flagfile)


if __name__ == "__main__":
  app.run(main)
