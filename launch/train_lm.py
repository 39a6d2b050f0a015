"""Trains a Transformer on text, from flags to a report.

  python -m launch.train_lm --workdir=runs/lm
  python -m launch.train_lm --preset=joma_figure6 --data_dir=DATA --workdir=DIR

The default reads the embedded text; presets named after figures repeat the runs
behind Figures 7 and 10 of Scan & Snap (https://arxiv.org/abs/2305.16380) and 6
and 8 of JoMA (https://arxiv.org/abs/2310.00535) on WikiText-2, which --data_dir
holds. Flags are laid over a preset. Below --workdir it writes metrics.jsonl,
summary.json, attn_maps.npz, flags.txt, config.json, checkpoints/, figures/ and
report.html. The same command continues an interrupted run; --flagfile=
OLD/flags.txt --workdir=NEW repeats one.
"""

import contextlib
import pathlib
import shlex
import sys
import time
from typing import Any

from absl import flags

from joma.transformer.training import lm_config
from launch import app
from launch import flag_config
from scansnap_jax.experiment import workdir as workdir_lib

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Local folder of this run.", required=True
)
_PRESET = flags.DEFINE_enum(
    "preset", "default", [*lm_config.PRESETS], "Settings to start from."
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Folder that holds the corpus, or its folder."
)
_REFERENCE_CSV = flags.DEFINE_string(
    "reference_csv",
    None,
    "Curves to draw beside: nlayers, lr, seed, minibatch, val_loss, and"
    " attn_entropy_layer0 to the last.",
)
_SAVE_HF = flags.DEFINE_boolean(
    "save_hf",
    False,
    "Write the model at each of map_steps as a Hugging Face folder, hf/step0"
    " and so on, which inspect_lm and generate read.",
)
_MULTIHOST = flags.DEFINE_boolean(
    "multihost", False, "Set when the same command runs on every host."
)
_NUM_CPU_DEVICES = flags.DEFINE_integer(
    "num_cpu_devices", 1, "Devices to split a CPU into.", 1
)
_CONFIG = flag_config.define(lm_config.default())


def main(_: list[str]) -> None:
  """Claims the workdir, trains, writes what was measured."""
  started = time.monotonic()
  config = _CONFIG(lm_config.PRESETS[_PRESET.value]())
  # Imported here, so that --help and wrong flags answer at once.
  from launch import train_lm_run
  from scansnap_jax.experiment import devices
  from scansnap_jax.experiment import preemption

  devices.set_up(
      multihost=_MULTIHOST.value, num_cpu_devices=_NUM_CPU_DEVICES.value
  )
  workdir = pathlib.Path(_WORKDIR.value).expanduser().absolute()
  train_lm_run.check(config, _REFERENCE_CSV.value, _SAVE_HF.value)
  with devices.main_process_first():
    if devices.is_main_process():
      _claim(config)
  is_main = devices.is_main_process()
  with workdir_lib.lock(workdir) if is_main else contextlib.nullcontext():
    try:
      run = train_lm_run.train(config, workdir, _DATA_DIR.value, _SAVE_HF.value)
    except preemption.Stopped as stopped:
      print(
          f"Stopped in {stopped}. The same command continues.", file=sys.stderr
      )
      return
    if is_main:
      facts = {
          "command": f"python -m launch.train_lm {shlex.join(sys.argv[1:])}",
          "devices": devices.describe(),
      }
      report = train_lm_run.write(
          run,
          workdir,
          preset=_PRESET.value,
          reference_csv=_REFERENCE_CSV.value,
          facts=facts,
          started=started,
      )
      print(f"{time.monotonic() - started:.1f} s. Report: {report}")


def _claim(config: lm_config.LmConfig) -> None:
  """Makes the workdir this run's, or finds it so."""
  described: dict[str, Any] = {
      "preset": _PRESET.value,
      "lm": workdir_lib.config_to_json(config),
  }
  extra = {"preset": _PRESET.value, "data_dir": _DATA_DIR.value}
  flagfile = flag_config.to_flagfile(config, extra)
  workdir_lib.claim(_WORKDIR.value, described, flagfile)


if __name__ == "__main__":
  app.run(main)
