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
import shlex
import sys
import time

from absl import flags

from joma.inference.sparsity import contextual_config
from launch import app
from launch import flag_config
from scansnap_jax.experiment import workdir as workdir_lib

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Local folder of this run.", required=True
)
_CONFIG = flag_config.define(contextual_config.ContextualConfig())


def main(_: list[str]) -> None:
  """Claims the workdir, studies the model, writes the report."""
  started = time.monotonic()
  config = _CONFIG()
  # Imported here, so that --help and wrong flags answer at once.
  from joma.inference.sparsity import contextual_study
  from launch import report_contextual_sparsity
  from scansnap_jax.experiment import devices
  from scansnap_jax.experiment import preemption
  from scansnap_jax.experiment import progress

  devices.set_up(num_cpu_devices=1)  # Whose computations take all cores.
  workdir = workdir_lib.claim(
      _WORKDIR.value,
      workdir_lib.config_to_json(config),
      flag_config.to_flagfile(config, {}),
  )
  num_steps = config.predictor.num_steps
  num_steps += config.num_steps if config.model is None else 0
  with workdir_lib.lock(pathlib.Path(workdir)):
    try:
      with progress.bar(
          "training", num_runs=1, steps_per_run=num_steps
      ) as on_progress:
        summary = contextual_study.study(config, workdir, on_progress)
    except preemption.Stopped as stopped:
      print(
          f"Stopped in {stopped}. The same command continues.", file=sys.stderr
      )
      return
    facts = {
        "command": (
            f"python -m launch.contextual_sparsity {shlex.join(sys.argv[1:])}"
        ),
        "devices": devices.describe(),
    }
    report = report_contextual_sparsity.write(workdir, summary, facts, started)
  print(summary["finding"])
  print(f"{time.monotonic() - started:.1f} s. Report: {report}")


if __name__ == "__main__":
  app.run(main)
