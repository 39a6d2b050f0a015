"""Measures attention sparsity and MLP ranks of real models (JoMA, Figure 7).

  python -m launch.inspect_lm --model=DIR --text=FILE --workdir=runs/inspect

--model is a folder as Hugging Face's transformers writes it, or a name there,
as EleutherAI/pythia-70m@step1000. Several, as
--model=DIR,DIR, --model=DIR --model=DIR or --model='pythia/step*', are
compared, and drawn as a series over training steps where their names end in
numbers; one that cannot be measured is named, and costs no other. What is read
is a text, through the folder's tokenizer (that of the first where a checkpoint
has none), or token ids: --ids=FILE.npz with an array `ids` [B, T].
--logits_out=FILE.npy writes the logits of every position.

Below --workdir, if there is one: report.html, summary.json (every number that
the figures show, by layer and head), figures/, flags.txt, config.json; with
--explore also explore.html, the page of `launch.explore`.
"""

import functools
import pathlib
from typing import Any

from absl import flags

from joma.transformer import inspection_config
from launch.command import app
from launch.command import flag_config
from launch.command import run
from launch.explore import beside
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import workdir as workdir_lib

_MODEL = flags.DEFINE_multi_string(
    "model",
    None,
    "Folder of a model, or its name on Hugging Face, as org/name@revision;"
    " several, or a pattern of folders.",
    required=True,
)
_WORKDIR = run.define_workdir(
    "Local folder of this run; none writes no report.", is_required=False
)
_EXPLORE = beside.define(
    "Whether to write explore.html, too: the first window of the first model's"
    " text, token by token, with the attention of every head on it."
)
_CONFIG = flag_config.define(inspection_config.InspectionConfig())


def main(_: list[str]) -> None:
  """Measures every model and writes the report."""
  config = _CONFIG()
  if config.text is None and config.ids is None:
    raise errors.UserError("give --text=FILE or --ids=FILE.npz")
  if _EXPLORE.value and _WORKDIR.value is None:
    raise errors.UserError("--explore writes into --workdir=DIR: give one.")
  # Imported here, so that --help and wrong flags answer at once.
  from joma.transformer.checkpoints import measure as checkpoints

  folders = checkpoints.find_models(_MODEL.value)
  texts = checkpoints.read_all(folders, config)

  def measure(_: run.Run) -> list[dict[str, Any]]:
    return checkpoints.measure_each(folders, texts, config)

  def report(
      this: run.Run, models: list[dict[str, Any]]
  ) -> pathlib.Path | None:
    from joma.transformer.checkpoints import report as reports

    facts = {
        **this.facts,
        "models": "\n".join(map(str, folders)),
        "read": str(config.text or config.ids),
    }
    if _EXPLORE.value:
      make = functools.partial(_page, folders, texts, models, config)
      beside.write(this.folder, make)
      facts |= beside.link()
    path = this.workdir and reports.write(
        this.workdir, {"models": models}, facts, this.started
    )
    print(reports.finding(models))
    return path

  folder = functools.partial(_folder, _WORKDIR.value, folders, config)
  run.run(
      "inspect_lm",
      folder if _WORKDIR.value else None,
      measure=measure,
      report=report,
  )


def _page(
    folders: list[pathlib.Path],
    texts: list[Any],
    models: list[dict[str, Any]],
    config: inspection_config.InspectionConfig,
) -> Any:
  """The page of the first model that could be measured."""
  from joma.inference.explore import beside as pages

  first = next(i for i, model in enumerate(models) if "failed" not in model)
  ids = texts[first][0, : models[first]["window"]]
  return pages.of_model(folders[first], ids, config.attention)


def _folder(
    workdir: str,
    folders: list[pathlib.Path],
    config: inspection_config.InspectionConfig,
) -> run.Folder:
  models = ",".join(map(str, folders))
  return run.Folder(
      workdir,
      {"model": models, **workdir_lib.config_to_json(config)},
      flag_config.to_flagfile(
          config, {"model": models, "explore": _EXPLORE.value or None}
      ),
  )


if __name__ == "__main__":
  app.run(main)
