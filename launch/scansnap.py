"""Runs the one-layer experiments of Scan & Snap, from flags to a report.

  python -m launch.scansnap --workdir=runs/scansnap

is the main job: Figures 4 and 6 at the paper's size and a table of every
theorem. `--preset=figure5` and the like run one figure; flags given explicitly
are laid over the preset. Below --workdir it writes report.html, summary.json,
figures/, metrics.jsonl, flags.txt, config.json and checkpoints/. The same
command continues an interrupted run; --flagfile=OLD/flags.txt --workdir=NEW
repeats one.
"""

from collections.abc import Mapping
from concurrent import futures
import pathlib
from typing import Any

from absl import flags

from launch.command import app
from launch.command import beside as beside_lib
from launch.command import flag_config
from launch.command import run
from launch.command import trackers
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
    run.SMOKE: {"sweep": config_lib.smoke},
}

_WORKDIR = run.define_workdir()
_PRESET = flags.DEFINE_enum(
    "preset",
    "main",
    list(_PRESETS),
    "What to run; sweep is the flags alone, smoke one that takes seconds.",
)
_MULTIHOST = run.define_multihost()
_NUM_CPU_DEVICES = run.define_num_cpu_devices()
trackers.define()
_CONFIG = flag_config.define(config_lib.ScanSnapConfig())


def main(_: list[str]) -> None:
  """Trains what the preset trains, and writes the report."""
  configs = {
      name: _CONFIG(base()) for name, base in _PRESETS[_PRESET.value].items()
  }
  _check_flags(configs)
  with run.start(
      "scansnap",
      lambda: _folder(configs),
      check=lambda: _check_data(configs),
      multihost=_MULTIHOST.value,
      num_cpu_devices=_NUM_CPU_DEVICES.value,
  ) as this:
    # Imported here, so that --help and wrong flags answer at once.
    from scansnap_jax.figures import report
    from scansnap_jax.theorems import table

    with beside_lib.one_thread() as beside:
      has_checks = _PRESET.value in ("main", "theorems")
      checks = table.begin_all(beside) if has_checks else []
      results, sections = _train(configs, this.folder, beside)
      if not configs and _PRESET.value in report.TITLES:
        sections = [
            beside.submit(report.draw_section, this.folder, _PRESET.value)
        ]
      this.finish(
          lambda: report.write(
              *(this.folder, configs, results),
              [section.result() for section in sections],
              [check.result() for check in checks],
              *(this.facts, this.started),
          )
      )


def _train(
    configs: Mapping[str, config_lib.ScanSnapConfig],
    folder: pathlib.Path,
    beside: futures.Executor,
) -> tuple[dict[str, Any], list[futures.Future[Any]]]:
  """Trains every config; returns the results by name, and their sections."""
  from scansnap_jax import train
  from scansnap_jax.experiment import progress
  from scansnap_jax.figures import report

  results, sections = {}, []
  for name, config in configs.items():
    with progress.bar(
        name,
        total=config.num_runs * config.num_steps,
        unit="runs",
        per_step=1 / config.num_steps,
    ) as on_progress:
      results[name] = train.train_and_evaluate(
          config,
          folder,
          experiment=name,
          keep_params=False,
          on_progress=on_progress,
      )
    drawing = (report.draw_section, folder, name, config, results[name])
    sections.append(beside.submit(*drawing))
  return results, sections


def _check_data(configs: Mapping[str, config_lib.ScanSnapConfig]) -> None:
  """Raises what is wrong with the classes, before a folder is claimed."""
  from scansnap_jax import data

  for config in configs.values():
    for num_last in config.num_last:
      data.make_classes(config.data, num_last)


def _check_flags(configs: Mapping[str, config_lib.ScanSnapConfig]) -> None:
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


def _folder(configs: Mapping[str, config_lib.ScanSnapConfig]) -> run.Folder:
  """What makes the workdir this run's."""
  from scansnap_jax.experiment import inputs

  described = {
      "preset": _PRESET.value,
      "experiments": workdir_lib.config_to_json(configs),
      "classes_sha256": {
          name: inputs.named_sha256(config.data.classes_file)
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
  return run.Folder(_WORKDIR.value, described, flagfile)


if __name__ == "__main__":
  app.run(main)
