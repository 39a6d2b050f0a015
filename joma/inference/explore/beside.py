"""Pages beside the reports of `inspect_lm` and `evaluate_cache`."""

import pathlib
from typing import Any

from jaxtyping import Int
import numpy as np

from joma.inference.evaluation import evaluate_config
from joma.inference.evaluation import evaluate_grid
from joma.inference.explore import explore
from joma.inference.explore import explore_config
from joma.inference.explore import view as view_lib
from joma.systems.cache_policies import names as policy_names
from joma.transformer import layer_hooks
from joma.transformer import model as models
from joma.transformer.hf import hub
from joma.transformer.hf import pretrained
from joma.transformer.text import tokenizer as tokenizers


def of_model(
    folder: pathlib.Path,
    ids: Int[np.ndarray, "T"],
    attention: tuple[str, ...] = (),
) -> view_lib.View:
  """Shows what a model attends to, without policies.

  Args:
    folder: Of the model; its tokenizer, if there is one, says what ids are.
    ids: What it reads.
    attention: Systems laid over it.
  """
  shape, params = pretrained.load(folder)
  model = models.Transformer(layer_hooks.over(shape, attention))
  local = hub.folder(folder)
  pieces = None
  if tokenizers.is_in(local):
    pieces = explore.pieces_of(tokenizers.from_folder(local), ids)
  config = explore_config.ExploreConfig(policies=(), max_new_tokens=0)
  found = explore.read(
      model, params, ids, config, name=folder.resolve().name, pieces=pieces
  )
  return view_lib.of_recording(found)


def of_evaluation(
    config: evaluate_config.EvaluateConfig,
    subject: evaluate_grid.Subject,
    data_dir: str | None,
    name: str,
) -> view_lib.View:
  """Shows what policies keep of the first text that an evaluation reads.

  Policies are those that were asked for, with the fewest slots.

  Args:
    config: Settings of the evaluation.
    subject: The model.
    data_dir: Where a corpus is looked for.
    name: Of the model.
  """
  ids, num_context = _first_text(config, subject, data_dir)
  at_once = {"tokens": 0, "context": num_context, "prompt": len(ids)}
  num_prompt = at_once[config.reading]
  asked = [n for n in config.policies if n != policy_names.REFERENCE]
  shown = explore_config.ExploreConfig(
      policies=tuple(asked),
      slots=min(config.capacities()),
      max_new_tokens=1,
      reading="prompt" if num_prompt else "tokens",
  )
  pieces = None
  if subject.tokenizer is not None:
    pieces = explore.pieces_of(subject.tokenizer, ids)
  found = explore.read(
      subject.model,
      subject.params,
      ids,
      shown,
      name=name,
      pieces=pieces,
      num_prompt=num_prompt or None,
      evaluation=config,
  )
  return view_lib.of_recording(found)


def _first_text(
    config: evaluate_config.EvaluateConfig,
    subject: evaluate_grid.Subject,
    data_dir: str | None,
) -> tuple[Int[np.ndarray, "T"], int]:
  """The first text of the first task, and how much of it is context."""
  first: Any = evaluate_grid.batches(
      config, subject, config.tasks[0], data_dir
  )[0]
  if not isinstance(first, tuple):
    return first[0], len(first[0])
  batch = first[0]
  return batch.tokens[0, : batch.lengths[0]], int(batch.num_context[0])
