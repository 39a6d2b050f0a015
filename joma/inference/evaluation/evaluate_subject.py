"""The model of an evaluation: one from a folder, or one trained on the task."""

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np

from joma.inference.evaluation import evaluate_config
from joma.inference.evaluation import evaluate_data
from joma.inference.evaluation import evaluate_grid
from joma.inference.evaluation import task_training
from joma.transformer import layer_hooks
from joma.transformer import model as models
from joma.transformer.hf import pretrained
from joma.transformer.text import tokenizer as tokenizer_lib
from joma.transformer.training import init
from scansnap_jax.experiment import errors

Config = evaluate_config.EvaluateConfig


def check(config: Config, folder: str | None) -> None:
  """Says what cannot be before anything long begins.

  Raises:
    UserError: A policy or budget cannot be, or a task wants a model, a
      tokenizer, or a longer range than the model has.
  """
  if folder is None:
    for task in config.tasks:
      if task not in evaluate_config.SYMBOLS or len(config.tasks) > 1:
        raise errors.UserError(
            "without --model one is trained, on one task of"
            f" {', '.join(evaluate_config.SYMBOLS)}; got"
            f" tasks={','.join(config.tasks)}."
        )
    if config.attention:
      raise errors.UserError(
          f"attention={','.join(config.attention)} is laid over a --model;"
          " without one give shape.attention."
      )
    shape = _shape(config)
    init.check_memory(shape)
    evaluate_data.drawer(config, config.tasks[0], shape.vocab_size, None)(
        np.random.default_rng(0)
    )
  else:
    shape = layer_hooks.over(pretrained.read_config(folder), config.attention)
    if set(config.tasks) - set(evaluate_config.SYMBOLS):
      tokenizer_lib.from_folder(folder)
  subject = evaluate_grid.Subject(model=models.Transformer(shape), params=None)
  evaluate_grid.check(config, subject)


def load(config: Config, folder: str) -> evaluate_grid.Subject:
  """Reads a model, and its tokenizer where a task is a text.

  Raises:
    UserError: As `pretrained.load`.
  """
  shape, params = pretrained.load(folder)
  shape = layer_hooks.over(shape, config.attention)
  reads_text = set(config.tasks) - set(evaluate_config.SYMBOLS)
  return evaluate_grid.Subject(
      model=models.Transformer(shape),
      params=params,
      tokenizer=tokenizer_lib.from_folder(folder) if reads_text else None,
  )


def train(
    config: Config,
    on_progress: Callable[[int], None] = lambda num_steps: None,
) -> tuple[evaluate_grid.Subject, dict[str, Any]]:
  """Trains a model on the first task.

  Args:
    config: Settings.
    on_progress: Told how many steps have been taken since.

  Returns:
    The model, and `losses`, means over a fiftieth of the steps each.
  """
  shape = _shape(config)
  length = config.train_length or config.length
  draw = evaluate_data.drawer(
      dataclasses.replace(config, length=length),
      config.tasks[0],
      shape.vocab_size,
      None,
  )
  params, losses = task_training.train(
      shape,
      draw,
      num_steps=config.train_steps,
      batch_size=config.train_batch,
      lr=config.lr,
      seed=config.train_seed,
      on_progress=on_progress,
  )
  parts = np.array_split(losses, min(50, len(losses)))
  subject = evaluate_grid.Subject(
      model=models.Transformer(shape), params=params
  )
  return subject, {"losses": [float(part.mean()) for part in parts]}


def _shape(config: Config):
  return dataclasses.replace(
      config.shape,
      vocab_size=config.vocab_size,
      max_len=max(config.length, config.train_length),
  )
