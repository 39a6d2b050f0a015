"""Leaves out neurons and heads that a token does not need: quality and bytes.

  python -m launch.contextual_sparsity --workdir=runs/sparsity

Trains a small ReLU model on the embedded text (or reads --model=DIR, a folder
as Hugging Face's transformers writes it), captures what its neurons and heads
do, trains predictors of both for all layers at once, as Deja Vu
(https://arxiv.org/abs/2310.17157) does, and measures perplexity against the
weights that a token reads, beside GRIFFIN, thresholds as CATS and TEAL have
them, an oracle and chance. Below --workdir: report.html, summary.json,
figures/, predictors.npz, capture/, model/, flags.txt, config.json. The same
command continues an interrupted run.
"""

import pathlib
from typing import Any

from joma.inference.sparsity import contextual_config
from launch.command import app
from launch.command import flag_config
from launch.command import run
from launch.command import trackers
from scansnap_jax.experiment import workdir as workdir_lib

_WORKDIR = run.define_workdir()
_PRESET = run.define_preset()
trackers.define()
_CONFIG = flag_config.define(contextual_config.ContextualConfig())


def main(_: list[str]) -> None:
  """Studies the model and writes the report."""
  config = _CONFIG(contextual_config.PRESETS[_PRESET.value]())
  folder = run.Folder(
      _WORKDIR.value,
      workdir_lib.config_to_json(config),
      flag_config.to_flagfile(config, {}),
  )
  run.run(
      "contextual_sparsity",
      lambda: folder,
      measure=lambda this: _measure(config, this.folder),
      report=_report,
  )


def _measure(
    config: contextual_config.ContextualConfig, workdir: pathlib.Path
) -> dict[str, Any]:
  """Studies the model, with a progress bar of what trains."""
  from joma.inference.sparsity.study import contextual_study
  from scansnap_jax.experiment import progress

  num_steps = config.predictor.num_steps if config.with_rules else 0
  num_steps += config.num_steps if config.model is None else 0
  with progress.bar("training", total=num_steps, unit="steps") as on_progress:
    return contextual_study.study(config, workdir, on_progress)


def _report(this: run.Run, summary: dict[str, Any]) -> pathlib.Path:
  from joma.inference.sparsity.study import report

  path = report.write(this.folder, summary, this.facts, this.started)
  print(summary["finding"])
  return path


if __name__ == "__main__":
  app.run(main)
