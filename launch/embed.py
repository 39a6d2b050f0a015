"""Turns each line of a file into a vector, by a model's residual stream.

  python -m launch.embed --model=DIR --text=FILE --pooling=mean

--model is a folder as Hugging Face's transformers or this project writes it.
--out becomes a file .npz with `embeddings`, float32 [B, D], vectors of length 1
in the order of the lines.
"""

import io

from absl import flags

from launch.command import app
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import workdir

_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Folder of a model with its tokenizer, or its name on Hugging Face, as"
    " org/name@revision.",
    required=True,
)
_TEXT = flags.DEFINE_string(
    "text", None, "Text file whose every line is a text.", required=True
)
_POOLING = flags.DEFINE_enum(
    "pooling",
    "mean",
    ["mean", "eos"],
    "What stands for a text: the mean of its tokens' states after the last"
    " layer, or the state of the last token.",
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Texts that are read at once.", 1, 4096
)
_OUT = flags.DEFINE_string(
    "out", "embeddings.npz", "File .npz to write, which is not there yet."
)


def main(_: list[str]) -> None:
  """Reads the lines and writes their vectors."""
  out = json_file.local_path(_OUT.value)
  if out.suffix != ".npz":
    raise errors.UserError(f"--out={_OUT.value} must end in .npz.")
  if out.exists():
    raise errors.UserError(f"--out={_OUT.value} is there: give another name.")
  workdir.check_can_be_made(out, "--out")
  lines = json_file.read_lines(json_file.local_path(_TEXT.value), "text")
  # Imported here, so that --help and wrong flags answer at once.
  import numpy as np

  from joma.transformer.checkpoints import embed
  from scansnap_jax.experiment.processes import devices

  devices.set_up(num_cpu_devices=1)  # Whose computations take all cores.
  folder = json_file.local_path(_MODEL.value)
  found = embed.embed_lines(folder, lines, _POOLING.value, _BATCH_SIZE.value)
  buffer = io.BytesIO()
  np.savez(buffer, embeddings=found)
  workdir.make_folder(out.absolute().parent)
  workdir.write_atomic(out, buffer.getvalue())
  print(f"{found.shape[0]} vectors of {found.shape[1]} numbers: {out}")


if __name__ == "__main__":
  app.run(main)
