"""A script that runs one study of a table: flags, claim, report.

  _RUN = study_run.define("joma", "preset", STUDIES, "figure4")
  if __name__ == "__main__":
    app.run(lambda _: _RUN())

The flags of a study begin with its name, as `--figure4.step_size`.
"""

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
from typing import Any

from absl import flags

from joma.studies import study as study_lib
from launch.command import flag_config
from launch.command import run
from launch.command import trackers
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import workdir as workdir_lib

flags.disclaim_key_flags()  # --help lists the flags under the script.

Studies = Mapping[str, study_lib.Study]


def define(
    script: str,
    flag: str,
    studies: Studies,
    default: str,
    *,
    variants: Mapping[str, tuple[str, Any]] | None = None,
    multihost: bool = False,
) -> Callable[[], None]:
  """Defines the flags of a script, and returns what runs it.

  Args:
    script: Name of the script in `launch`.
    flag: Name of the flag that chooses.
    studies: All there are, by name.
    default: The chosen one where the flag is not given.
    variants: More choices: a study's name, and settings in place of its own.
    multihost: Whether every host may run the command.
  """
  variants = variants or {}
  workdir = run.define_workdir()
  trackers.define()
  chosen = flags.DEFINE_enum(
      flag, default, [*studies, *variants], "What to run."
  )
  on_hosts = run.define_multihost() if multihost else None
  num_cpu_devices = run.define_num_cpu_devices()
  has_smoke = any(study.smoke for study in studies.values())
  preset = run.define_preset() if has_smoke else None
  configs = {
      name: flag_config.define(study.config, prefix=f"{name}.")
      for name, study in studies.items()
  }

  def start() -> None:
    name, base = variants.get(chosen.value, (chosen.value, None))
    if preset is not None and preset.value == run.SMOKE:
      base = dataclasses.replace(studies[name].config, **studies[name].smoke)
    _check_flags(studies, name, f"--{flag}={chosen.value}")
    study, config = studies[name], configs[name](base)
    claimed = {flag: chosen.value}
    with run.start(
        script,
        lambda: _folder(workdir.value, claimed, name, config),
        multihost=on_hosts is not None and on_hosts.value,
        num_cpu_devices=num_cpu_devices.value,
    ) as this:
      summary = study.measure(config, this.folder)
      this.finish(lambda: _report(this, name, study, summary))

  return start


def _report(
    this: run.Run, name: str, study: study_lib.Study, summary: dict[str, Any]
) -> pathlib.Path:
  from joma.studies import study_report

  path = study_report.write(
      this.folder, name, study, summary, this.facts, this.started
  )
  print(summary["finding"])
  return path


def _check_flags(studies: Studies, name: str, choice: str) -> None:
  """Refuses flags of other studies, which would have no effect."""
  for other, study in studies.items():
    given = flag_config.given_to_flagfile(study.config, {}, prefix=f"{other}.")
    if given and other != name:
      raise errors.UserError(
          f"{choice} runs {name}, so that {given.split()} have no effect. Leave"
          " them out."
      )


def _folder(
    workdir: str, claimed: dict[str, Any], name: str, config: Any
) -> run.Folder:
  """What makes the workdir this run's."""
  described = {**claimed, name: workdir_lib.config_to_json(config)}
  flagfile = flag_config.to_flagfile(config, claimed, prefix=f"{name}.")
  return run.Folder(workdir, described, flagfile)
