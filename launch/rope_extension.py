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
import shlex
import sys
import time

from absl import flags

from joma.transformer.rope import extension_config
from launch import app
from launch import flag_config
from scansnap_jax.experiment import workdir as workdir_lib

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Local folder of this run.", required=True
)
_CONFIG = flag_config.define(extension_config.RopeExtensionConfig())


def main(_: list[str]) -> None:
  """Claims the workdir, trains, reads, writes the report."""
  started = time.monotonic()
  config = _CONFIG()
  # Imported here, so that --help and wrong flags answer at once.
  from joma.transformer.rope import extension
  from launch import report_rope_extension
  from scansnap_jax.experiment import devices
  from scansnap_jax.experiment import preemption
  from scansnap_jax.experiment import progress

  devices.set_up(num_cpu_devices=1)  # Whose computations take all cores.
  workdir = workdir_lib.claim(
      _WORKDIR.value,
      workdir_lib.config_to_json(config),
      flag_config.to_flagfile(config, {}),
  )
  with workdir_lib.lock(pathlib.Path(workdir)):
    try:
      with progress.bar(
          "training", num_runs=1, steps_per_run=config.num_steps
      ) as on_progress:
        summary = extension.measure(config, workdir, on_progress)
    except preemption.Stopped as stopped:
      print(
          f"Stopped in {stopped}. The same command continues.", file=sys.stderr
      )
      return
    facts = {
        "command": (
            f"python -m launch.rope_extension {shlex.join(sys.argv[1:])}"
        ),
        "devices": devices.describe(),
    }
    report = report_rope_extension.write(workdir, summary, facts, started)
  print(summary["finding"])
  print(f"{time.monotonic() - started:.1f} s. Report: {report}")


if __name__ == "__main__":
  app.run(main)
