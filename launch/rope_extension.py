"""Reads texts longer than those of training, with each kind of rotary position.

  python -m launch.rope_extension --workdir=runs/rope

Trains a small Llama on 64 bytes at a time of the embedded text and lets it read
256: as it is, with position interpolation (https://arxiv.org/abs/2306.15595),
NTK-aware and YaRN frequencies, and after a short fine-tuning. Below --workdir:
report.html, summary.json, figures/ (perplexity against position),
metrics.jsonl, checkpoints/, flags.txt, config.json. The same command continues
an interrupted training.
"""

import pathlib
from typing import Any

from joma.transformer.rope import extension_config
from launch.command import app
from launch.command import flag_config
from launch.command import run
from launch.command import trackers
from scansnap_jax.experiment import workdir as workdir_lib

_WORKDIR = run.define_workdir()
_PRESET = run.define_preset()
trackers.define()
_CONFIG = flag_config.define(extension_config.RopeExtensionConfig())


def main(_: list[str]) -> None:
  """Trains, reads, and writes the report."""
  config = _CONFIG(extension_config.PRESETS[_PRESET.value]())
  folder = run.Folder(
      _WORKDIR.value,
      workdir_lib.config_to_json(config),
      flag_config.to_flagfile(config, {}),
  )
  run.run(
      "rope_extension",
      lambda: folder,
      measure=lambda this: _measure(config, this.folder),
      report=_report,
  )


def _measure(
    config: extension_config.RopeExtensionConfig, workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains and reads, with a progress bar."""
  from joma.transformer.rope import extension
  from scansnap_jax.experiment import progress

  with progress.bar(
      "training", total=config.num_steps, unit="steps"
  ) as on_progress:
    return extension.measure(config, workdir, on_progress)


def _report(this: run.Run, summary: dict[str, Any]) -> pathlib.Path:
  from joma.transformer.rope import extension_report

  path = extension_report.write(this.folder, summary, this.facts, this.started)
  print(summary["finding"])
  return path


if __name__ == "__main__":
  app.run(main)
