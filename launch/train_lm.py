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

import math
import pathlib
from typing import Any

from absl import flags

from joma.transformer.training import lm_config
from launch.command import app
from launch.command import flag_config
from launch.command import run
from launch.command import trackers
from scansnap_jax.experiment import workdir as workdir_lib

_WORKDIR = run.define_workdir()
_PRESET = flags.DEFINE_enum(
    "preset", "default", [*lm_config.PRESETS], "Settings to start from."
)
_DATA_DIR = run.define_data_dir()
_REFERENCE_CSV = run.define_reference_csv()
_SAVE_HF = flags.DEFINE_boolean(
    "save_hf",
    False,
    "Write the model at each of map_steps and at the end as a Hugging Face"
    " folder, hf/step0 and so on, which transformers, inspect_lm and generate"
    " read. The same command over a run that is done writes its end.",
)
_SAVE_OWN = flags.DEFINE_boolean(
    "save_own",
    False,
    "Write the model at each of map_steps and at the end as a folder of the"
    " project's own form, own/step0 and so on: it describes every model, and"
    " inspect_lm, generate and evaluate_cache read it.",
)
_MULTIHOST = run.define_multihost()
_MESH = run.define_mesh()
_PROFILE = flags.DEFINE_string(
    "profile",
    None,
    "Steps START:STOP, as 100:150, whose programs are traced; the trace goes to"
    " profile/ and XProf shows it.",
)
trackers.define()
flags.DEFINE_boolean(
    "tensorboard",
    False,
    "Write TensorBoard events; --trackers=tensorboard does so too.",
)
_NUM_CPU_DEVICES = flags.DEFINE_integer(
    "num_cpu_devices", 1, "Devices to split a CPU into.", 1, 4096
)
_CONFIG = flag_config.define(lm_config.default())


def main(_: list[str]) -> None:
  """Trains, and writes what was measured."""
  config = _CONFIG(lm_config.PRESETS[_PRESET.value]())
  sizes = run.mesh_sizes(_MESH.value)
  if sizes is not None:
    config = lm_config.on_mesh(config, sizes)
  learned: Any = None

  def check() -> None:
    nonlocal config, learned
    from joma.transformer.training import layouts
    from joma.transformer.training import run as training_run

    layouts.make_layout(config, sizes[0] if sizes else None)
    training_run.check(
        config, _REFERENCE_CSV.value, _SAVE_HF.value, _PROFILE.value
    )
    if flags.FLAGS["model.vocab_size"].using_default_value:
      config, learned = training_run.with_vocabulary(
          config, _WORKDIR.value, _DATA_DIR.value
      )

  def measure(this: run.Run) -> Any:
    from joma.transformer.training import run as training_run

    forms = ["hf"] * _SAVE_HF.value + ["own"] * _SAVE_OWN.value
    return training_run.train(
        config,
        this.folder,
        _DATA_DIR.value,
        forms,
        learned=learned,
        profile=_PROFILE.value,
    )

  def report(this: run.Run, trained: Any) -> pathlib.Path:
    from joma.transformer.training import run as training_run

    return training_run.write(
        trained,
        this.folder,
        preset=_PRESET.value,
        reference_csv=_REFERENCE_CSV.value,
        facts=this.facts,
        started=this.started,
    )

  run.run(
      "train_lm",
      lambda: _folder(config),
      measure=measure,
      report=report,
      check=check,
      multihost=_MULTIHOST.value,
      num_cpu_devices=max(
          _NUM_CPU_DEVICES.value,
          math.prod(sizes or (1,)),
          # As a flagfile has a mesh.
          config.fsdp * config.tensor * config.seq,
      ),
  )


def _folder(config: lm_config.LmConfig) -> run.Folder:
  """What makes the workdir this run's."""
  described: dict[str, Any] = {
      "preset": _PRESET.value,
      "lm": workdir_lib.config_to_json(config),
  }
  extra = {"preset": _PRESET.value, "data_dir": _DATA_DIR.value}
  flagfile = flag_config.to_flagfile(config, extra)
  may_differ = tuple(f"lm.{name}" for name in lm_config.MAY_DIFFER)
  return run.Folder(_WORKDIR.value, described, flagfile, may_differ)


if __name__ == "__main__":
  app.run(main)
