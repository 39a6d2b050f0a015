r"""Evaluates KV-cache policies: quality against budget, and against bytes.

  python -m launch.evaluate_cache --workdir=runs/mqar
  python -m launch.evaluate_cache --model=DIR --tasks=perplexity,passkey \
      --length=512 --batch_size=8 --corpus=wikitext2-raw --data_dir=DATA \
      --workdir=runs/cache

  python -m launch.evaluate_cache --model=DIR --tasks=ruler \
      --protocol=agnostic --length=512 --batch_size=4 --workdir=runs/ruler

Without --model a small Transformer is trained on the task first, in a minute or
two on two cores. Policies share texts, seeds and budgets, and stand beside the
full cache, a plain window and random eviction. What is reported of each:
quality with a 95 % interval, how many of the tokens that hold the answer were
still in the cache when it was asked, the bytes of a step by the cost model,
bytes held, measured time, compilations. With --tasks=ruler: a table of scores,
policies against tasks, by one of three protocols. Below --workdir: report.html,
summary.json, figures/, flags.txt, config.json, and rows.jsonl, a row as each
setting ends: a run that was cut goes on from there; with --explore also
explore.html, the page of `launch.explore`.

  python -m launch.evaluate_cache --tasks=count --workdir=runs/state \
      --shape.attention=gdn --shape.windows= --policies=full
  python -m launch.evaluate_cache --tasks=count --workdir=runs/softmax \
      --beside=runs/state

puts models side by side by the bytes that their caches hold.
"""

import dataclasses
import math
import pathlib
from typing import Any

from absl import flags

from joma.inference.evaluation import evaluate_config
from launch.command import app
from launch.command import flag_config
from launch.command import run
from launch.explore import beside
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import workdir as workdir_lib

_WORKDIR = run.define_workdir()
_PRESET = run.define_preset()
_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Folder of a model and its tokenizer, or its name on Hugging Face, as"
    " org/name@revision; none trains one.",
)
_DATA_DIR = run.define_data_dir()
_MESH = run.define_mesh()
_EXPLORE = beside.define(
    "Whether to write explore.html, too: the first text of the first task,"
    " token by token, and which tokens each policy keeps with the fewest slots."
)
_BESIDE = flags.DEFINE_list(
    "beside",
    [],
    "Folders of other runs of this script that have ended, of the same tasks,"
    " lengths and seeds: a table shows the bytes that each run's caches hold"
    " beside its accuracy.",
)
_CONFIG = flag_config.define(evaluate_config.EvaluateConfig())


def main(_: list[str]) -> None:
  """Makes or loads the model, evaluates, reports."""
  config = _CONFIG(evaluate_config.PRESETS[_PRESET.value]())
  sizes = run.mesh_sizes(_MESH.value)

  is_ruler = evaluate_config.RULER in config.tasks
  if is_ruler and _EXPLORE.value:
    raise errors.UserError(
        "--explore shows no text of --tasks=ruler: leave it out, or give one of"
        " its texts to launch.explore."
    )

  of_texts = {evaluate_config.RULER, evaluate_config.PERPLEXITY}
  if _BESIDE.value and of_texts & set(config.tasks):
    raise errors.UserError(
        "--beside compares accuracies of examples, of which"
        f" --tasks={','.join(config.tasks)} has none: leave it out."
    )

  def check() -> None:
    _others(config)
    if is_ruler:
      from joma.inference.evaluation.protocols import ruler_subject as subject
    else:
      from joma.inference.evaluation import evaluate_subject as subject
    subject.check(config, _MODEL.value)

  run.run(
      "evaluate_cache",
      lambda: _folder(config),
      measure=lambda this: (_measure_ruler if is_ruler else _measure)(
          config, this.folder, sizes
      ),
      report=(
          _report_ruler
          if is_ruler
          else lambda this, summary: _report(this, summary, config)
      ),
      check=check,
      num_cpu_devices=math.prod(sizes or (1,)),
  )


def _measure_ruler(
    config: evaluate_config.EvaluateConfig,
    workdir: pathlib.Path,
    sizes: tuple[int, ...] | None,
) -> dict[str, Any]:
  """Loads the model and reads RULER's tasks with every policy."""
  from joma.inference import on_mesh
  from joma.inference.evaluation.protocols import ruler_grid
  from joma.inference.evaluation.protocols import ruler_subject
  from scansnap_jax.experiment import progress

  reader = ruler_subject.load(config, _MODEL.value or "")
  subject = _on_mesh(config, reader.subject, sizes)
  reader = reader._replace(subject=subject)
  with (
      on_mesh.of_sizes(sizes),
      progress.bar(
          "reading", total=ruler_grid.num_cells(config), unit="tasks"
      ) as on_progress,
  ):
    found = ruler_grid.measure(config, reader, workdir, on_progress)
  facts = {"protocol": config.protocol, "passes": config.ruler.passes}
  return {**facts, **found}


def _report_ruler(this: run.Run, summary: dict[str, Any]) -> pathlib.Path:
  from joma.inference.evaluation.protocols import leaderboard
  from joma.inference.evaluation.protocols import ruler_report

  path = ruler_report.write(this.folder, summary, this.facts, this.started)
  board = leaderboard.make(summary["rows"], summary["passes"])
  print(*ruler_report.lines(board), sep="\n")
  print(ruler_report.finding(board, summary["protocol"]))
  return path


def _on_mesh(config: Any, subject: Any, sizes: tuple[int, ...] | None) -> Any:
  """Lays the parameters of what is evaluated out on the devices."""
  from joma.inference import on_mesh

  on_mesh.check(sizes, subject.model.config, config.batch_size)
  with on_mesh.of_sizes(sizes):
    params = on_mesh.place(subject.params, sizes)
  return dataclasses.replace(subject, params=params)


def _measure(
    config: evaluate_config.EvaluateConfig,
    workdir: pathlib.Path,
    sizes: tuple[int, ...] | None,
) -> dict[str, Any]:
  """Makes or loads the model and evaluates every policy on it."""
  from joma.inference import on_mesh
  from joma.inference.evaluation import evaluate_grid
  from scansnap_jax.experiment import progress

  subject, training = _subject(config)
  subject = _on_mesh(config, subject, sizes)
  with (
      on_mesh.of_sizes(sizes),
      progress.bar(
          "reading",
          total=evaluate_grid.num_readings(config, subject.model.config),
          unit="texts",
          per_step=config.batch_size,
      ) as on_progress,
  ):
    rows = evaluate_grid.measure(
        config,
        subject,
        _DATA_DIR.value,
        on_progress,
        workdir,
    )
    if _EXPLORE.value:
      beside.write(workdir, lambda: _page(config, subject))
  return {"tasks": rows, "training": training, "length": config.length}


def _page(config: evaluate_config.EvaluateConfig, subject: Any) -> Any:
  from joma.inference.explore import beside as pages

  name = pathlib.Path(_MODEL.value).name if _MODEL.value else "the model"
  return pages.of_evaluation(config, subject, _DATA_DIR.value, name)


def _others(config: evaluate_config.EvaluateConfig) -> dict[str, Any]:
  """The summaries of --beside."""
  from joma.inference.evaluation.protocols import other_runs

  own = pathlib.Path(_WORKDIR.value).resolve().name
  return other_runs.read(_BESIDE.value, config, own)


def _report(
    this: run.Run,
    summary: dict[str, Any],
    config: evaluate_config.EvaluateConfig,
) -> pathlib.Path:
  from joma.inference.evaluation import report
  from joma.inference.evaluation.protocols import other_runs

  facts = {**this.facts, **(beside.link() if _EXPLORE.value else {})}
  others, tables = _others(config), {}
  if others:
    runs = {this.folder.name: summary, **others}
    tables = {
        task: other_runs.entries(task, runs, config) for task in config.tasks
    }
  path = report.write(this.folder, summary, facts, this.started, tables)
  for task, found in summary["tasks"].items():
    print(report.finding(task, found))
    if task in tables:
      print(*other_runs.lines(tables[task]), sep="\n")
      print(other_runs.finding(tables[task]))
  return path


def _subject(config: evaluate_config.EvaluateConfig):
  """Loads or trains the model; says what training came to."""
  from joma.inference.evaluation import evaluate_subject
  from scansnap_jax.experiment import progress

  if _MODEL.value is not None:
    return evaluate_subject.load(config, _MODEL.value), None
  with progress.bar(
      "training", total=config.train_steps, unit="steps"
  ) as on_progress:
    return evaluate_subject.train(config, on_progress)


def _folder(config: evaluate_config.EvaluateConfig) -> run.Folder:
  extra = {"model": _MODEL.value, "data_dir": _DATA_DIR.value}
  given = {name: value for name, value in extra.items() if value is not None}
  extra["mesh"] = _MESH.value  # Results are the same on any.
  extra["explore"] = _EXPLORE.value or None
  extra["beside"] = ",".join(_BESIDE.value) or None
  return run.Folder(
      _WORKDIR.value,
      {**given, **workdir_lib.config_to_json(config)},
      flag_config.to_flagfile(config, extra),
  )


if __name__ == "__main__":
  app.run(main)
