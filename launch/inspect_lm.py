"""Measures attention sparsity and MLP ranks of real models (JoMA, Figure 7).

  python -m launch.inspect_lm --model=DIR --text=FILE --workdir=runs/inspect

--model is a folder as Hugging Face's transformers writes it. Several, as
--model=DIR,DIR, --model=DIR --model=DIR or --model='pythia/step*', are
compared, and drawn as a series over training steps where their names end in
numbers. What is read is a text, through the folder's tokenizer (that of the
first where a checkpoint has none), or token ids: --ids=FILE.npz with an array
`ids` [B, T]. --logits_out=FILE.npy writes the logits of every position.

Below --workdir, if there is one: report.html, summary.json (every number that
the figures show, by layer and head), figures/, flags.txt, config.json.
"""

import contextlib
import pathlib
import shlex
import sys
import time

from absl import flags

from joma.transformer import inspection_config
from launch import app
from launch import flag_config
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import workdir as workdir_lib

_MODEL = flags.DEFINE_multi_string(
    "model", None, "Folder of a model; several, or a pattern.", required=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Local folder of this run; none writes no report."
)
_CONFIG = flag_config.define(inspection_config.InspectionConfig())


def main(_: list[str]) -> None:
  """Claims the workdir, measures every model, writes the report."""
  started = time.monotonic()
  config = _CONFIG()
  if config.text is None and config.ids is None:
    raise errors.UserError("give --text=FILE or --ids=FILE.npz")
  # Imported here, so that --help and wrong flags answer at once.
  from launch import inspect_lm_run
  from launch import report_inspection
  from scansnap_jax.experiment import devices

  folders = inspect_lm_run.find_models(_MODEL.value)
  texts = inspect_lm_run.read_all(folders, config)
  devices.set_up(num_cpu_devices=1)  # Whose computations take all cores.
  workdir = _WORKDIR.value and _claim(_WORKDIR.value, folders, config)
  with workdir_lib.lock(workdir) if workdir else contextlib.nullcontext():
    models = [
        inspect_lm_run.measure(folder, ids, config)
        for folder, ids in zip(folders, texts, strict=True)
    ]
    facts = {
        "command": f"python -m launch.inspect_lm {shlex.join(sys.argv[1:])}",
        "models": "\n".join(map(str, folders)),
        "read": str(config.text or config.ids),
        "devices": devices.describe(),
    }
    report = workdir and report_inspection.write(
        workdir, {"models": models}, facts, started
    )
  print(report_inspection.finding(models))
  where = f" Report: {report}" if report else ""
  print(f"{time.monotonic() - started:.1f} s.{where}")


def _claim(
    workdir: str,
    folders: list[pathlib.Path],
    config: inspection_config.InspectionConfig,
) -> pathlib.Path:
  models = ",".join(map(str, folders))
  return workdir_lib.claim(
      workdir,
      {"model": models, **workdir_lib.config_to_json(config)},
      flag_config.to_flagfile(config, {"model": models}),
  )


if __name__ == "__main__":
  app.run(main)
