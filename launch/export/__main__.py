"""Writes the model of a finished run of train_lm as a folder for others.

  python -m launch.export --workdir=runs/lm --out=runs/lm_model

The folder holds config.json, model.safetensors and the tokenizer, as `train_lm
--save_hf` writes them: transformers, generate and inspect_lm read it. A model
that no Hugging Face family describes becomes a folder of the project's own
form. --workdir is read alone.
"""

from absl import flags

from launch.command import app
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import workdir as workdir_lib

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of a finished run of train_lm.", required=True
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "Folder to make, with those above it; it is not there or is empty.",
    required=True,
)
_STEP = flags.DEFINE_integer(
    "step", None, "Step whose checkpoint is taken; none is the last.", 0
)


def main(_: list[str]) -> None:
  """Reads the run and writes the folder."""
  out = json_file.local_path(_OUT.value).absolute()
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise errors.UserError(f"--out={_OUT.value} is there: give another name.")
  workdir_lib.check_can_be_made(out, "--out")
  # Imported here, so that --help and wrong flags answer at once.
  from joma.transformer.checkpoints import export
  from scansnap_jax.experiment.processes import devices

  devices.set_up(num_cpu_devices=1)  # Whose computations take all cores.
  workdir = json_file.local_path(_WORKDIR.value)
  written = export.export(workdir, out, _STEP.value)
  print(f"Step {written.step} as model_type {written.model_type}: {out}")


if __name__ == "__main__":
  app.run(main)
