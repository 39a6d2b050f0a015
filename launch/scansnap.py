"""Runs the one-layer experiments of Scan & Snap, from flags to a report.

  python -m launch.scansnap --workdir=runs/scansnap

is the main job: Figures 4 and 6 at the paper's size and a table of every
theorem. `--preset=figure5` and the like run one figure; flags given explicitly
are laid over the preset. Below --workdir it writes report.html, summary.json,
figures/, metrics.jsonl, flags.txt, config.json and checkpoints/. The same
command continues an interrupted run; --flagfile=OLD/flags.txt --workdir=NEW
repeats one.
"""

import contextlib
import hashlib
import pathlib
import shlex
import sys
import time

from absl import flags

from launch import app
from launch import flag_config
from scansnap_jax import config as config_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import workdir as workdir_lib

# What each preset trains; theory alone where that is nothing.
_PRESETS = {
    "main": {"figure4": config_lib.figure4, "figure6": config_lib.figure6},
    "figure3": {},
    "figure4": {"figure4": config_lib.figure4},
    "figure5": {"figure5": config_lib.figure5},
    "figure6": {"figure6": config_lib.figure6},
    "figure8": {},
    "figure9": {},
    "figure11": {"figure11": config_lib.figure11},
    "figure12": {"figure12": config_lib.figure12},
    "theorems": {},
    "sweep": {"sweep": config_lib.ScanSnapConfig},
}

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Local folder of this run.", required=True
)
_PRESET = flags.DEFINE_enum(
    "preset", "main", list(_PRESETS), "What to run; sweep is the flags alone."
)
_MULTIHOST = flags.DEFINE_boolean(
    "multihost", False, "Set when the same command runs on every host."
)
_NUM_CPU_DEVICES = flags.DEFINE_integer(
    "num_cpu_devices", 0, "Devices to split a CPU into; 0 is one per core.", 0
)
_CONFIG = flag_config.define(config_lib.ScanSnapConfig())


def main(_: list[str]) -> None:
  """Claims the workdir, trains what the preset trains, writes the report."""
  configs = {
      name: _CONFIG(base()) for name, base in _PRESETS[_PRESET.value].items()
  }
  _check_flags(configs)
  started = time.monotonic()
  # Imported here, so that --help and wrong flags answer at once.
  from launch import report_scansnap
  from scansnap_jax import data
  from scansnap_jax.experiment import devices
  from scansnap_jax.experiment import preemption

  devices.set_up(
      multihost=_MULTIHOST.value, num_cpu_devices=_NUM_CPU_DEVICES.value
  )
  for config in configs.values():
    for num_last in config.num_last:
      data.make_classes(config.data, num_last)  # Raises what is wrong.
  workdir = pathlib.Path(_WORKDIR.value).expanduser().absolute()
  with devices.main_process_first():
    if devices.is_main_process():
      _claim(configs)
  is_main = devices.is_main_process()
  with workdir_lib.lock(workdir) if is_main else contextlib.nullcontext():
    try:
      results = _train(configs, workdir)
    except preemption.Stopped as stopped:
      print(
          f"Stopped in {stopped}. The same command continues.", file=sys.stderr
      )
      return
    if is_main:
      facts = {
          "command": f"python -m launch.scansnap {shlex.join(sys.argv[1:])}",
          "devices": devices.describe(),
      }
      report = report_scansnap.write(
          workdir, _PRESET.value, configs, results, facts, started
      )
      print(f"{time.monotonic() - started:.1f} s. Report: {report}")


def _train(
    configs: dict[str, config_lib.ScanSnapConfig], workdir: pathlib.Path
):
  """Trains each experiment, with a progress bar; returns results by name."""
  from scansnap_jax import train
  from scansnap_jax.experiment import progress

  results = {}
  for name, config in configs.items():
    with progress.bar(
        name, num_runs=config.num_runs, steps_per_run=config.num_steps
    ) as on_progress:
      results[name] = train.train_and_evaluate(
          config, workdir, experiment=name, on_progress=on_progress
      )
  return results


def _check_flags(configs: dict[str, config_lib.ScanSnapConfig]) -> None:
  """Refuses flags without effect, and axes that Figures 4 and 5 do not show."""
  given = flag_config.given_to_flagfile(config_lib.ScanSnapConfig(), {})
  if given and not configs:
    raise errors.UserError(
        f"--preset={_PRESET.value} trains nothing, so that {given.split()} have"
        " no effect. Leave them out."
    )
  for name, axes in (
      ("figure4", ("num_last", "lr_z")),
      ("figure5", ("num_last", "lr_ratio")),
  ):
    for axis in axes if name in configs else ():
      values = getattr(configs[name], axis)
      if len(values) > 1:
        raise errors.UserError(
            f"{name} shows a single {axis}, got {axis}={values}. Choose one, or"
            " take --preset=figure6 or --preset=sweep."
        )


def _claim(configs: dict[str, config_lib.ScanSnapConfig]) -> None:
  """Makes the workdir this run's, or finds it so."""
  described = {
      "preset": _PRESET.value,
      "experiments": workdir_lib.config_to_json(configs),
      "classes_sha256": {
          name: (
              hashlib.sha256(
                  pathlib.Path(config.data.classes_file).read_bytes()
              ).hexdigest()
          )
          for name, config in configs.items()
          if config.data.classes_file is not None
      },
  }
  extra = {"preset": _PRESET.value}
  if len(configs) == 1:
    (config,) = configs.values()
    flagfile = flag_config.to_flagfile(config, extra)
  else:
    flagfile = flag_config.given_to_flagfile(config_lib.ScanSnapConfig(), extra)
  workdir_lib.claim(_WORKDIR.value, described, flagfile)


if __name__ == "__main__":
  app.run(main)
