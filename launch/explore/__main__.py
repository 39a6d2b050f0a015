r"""Shows what a model attends to in a text, and what cache policies keep.

  python -m launch.explore --model=DIR --prompt="The capital of France is" \
      --policies=h2o,snapkv --out=page.html
  python -m launch.explore --model=DIR --text=FILE --reading=tokens \
      --slots=64 --out=page.html

--out becomes one page of HTML that needs nothing else and loads nothing: the
text as tokens, and for a layer, a head and a step the attention on them, what
each policy still keeps and when each token left. A link to
page.html#layer=3&head=4&step=57 opens it there.
"""

from absl import flags

from joma.inference.explore import explore_config
from launch.command import app
from launch.command import flag_config
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import workdir as workdir_lib

_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Folder of a model and its tokenizer, or its name on Hugging Face, as"
    " org/name@revision.",
    required=True,
)
_PROMPT = flags.DEFINE_string("prompt", None, "The text itself.")
_TEXT = flags.DEFINE_string("text", None, "Text file, UTF-8, in place of one.")
_OUT = flags.DEFINE_string(
    "out", "page.html", "File .html to write, which is not there yet."
)
_CONFIG = flag_config.define(explore_config.ExploreConfig())


def main(_: list[str]) -> None:
  """Reads the text and writes the page."""
  config = _CONFIG()
  out = json_file.local_path(_OUT.value)
  if out.suffix != ".html":
    raise errors.UserError(f"--out={_OUT.value} must end in .html.")
  if out.exists():
    raise errors.UserError(f"--out={_OUT.value} is there: give another name.")
  workdir_lib.check_can_be_made(out, "--out")
  text = _read_text()
  # Imported here, so that --help and wrong flags answer at once.
  from joma.inference.explore import explore
  from joma.inference.explore import view as views
  from scansnap_jax.experiment.processes import devices

  devices.set_up(num_cpu_devices=1)  # Whose computations take all cores.
  view = explore.of_text(_MODEL.value, text, config)
  workdir_lib.make_folder(out.absolute().parent)
  view.write(out)
  size = out.stat().st_size / 1e6
  print(f"{views.finding(view.recording)}\n{out}: {size:.2f} MB")


def _read_text() -> str:
  prompt, path = _PROMPT.value, _TEXT.value
  if prompt is not None and path is None:
    return prompt
  if path is None or prompt is not None:
    raise errors.UserError("give one of --prompt=TEXT and --text=FILE.")
  try:
    return json_file.read_text(json_file.local_path(path))
  except errors.UserError as error:
    raise errors.UserError(f"text={error}") from error


if __name__ == "__main__":
  app.run(main)
