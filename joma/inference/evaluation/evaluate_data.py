"""Examples and texts of an evaluation, by seed.

Letters: B texts, T tokens.
"""

from collections.abc import Callable
import functools
from typing import Any

from jaxtyping import Int
import numpy as np

from joma.inference.evaluation import evaluate_config
from joma.inference.evaluation import filler
from joma.inference.evaluation import tasks
from joma.inference.evaluation import tasks_counting
from joma.inference.evaluation import tasks_needles
from joma.inference.evaluation import tasks_symbols
from joma.transformer.text import corpus as corpus_lib
from joma.transformer.text import tokenizer as tokenizer_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file

Config = evaluate_config.EvaluateConfig
Draw = Callable[[np.random.Generator], tasks.Example]


def drawer(
    config: Config,
    task: str,
    vocab_size: int,
    tokenizer: tokenizer_lib.Tokenizer | None,
) -> Draw:
  """Returns what draws an example of a task.

  Args:
    config: Settings.
    task: Any but perplexity.
    vocab_size: Of the model.
    tokenizer: Of the model; symbols do without.

  Raises:
    UserError: The task is unknown or needs a tokenizer.
  """
  if task in evaluate_config.SYMBOLS:
    options: dict[str, Any] = dict(length=config.length, vocab_size=vocab_size)
    if task == "mqar":
      options["num_pairs"] = config.num_pairs
    return functools.partial(getattr(tasks_symbols, task), **options)
  if task not in evaluate_config.TEXTS:
    raise errors.UserError(
        f"task={task} is none of {', '.join(evaluate_config.TASKS)}."
    )
  if tokenizer is None:
    raise errors.UserError(
        f"task={task} is a text: give --model, a folder with a tokenizer."
    )
  options = dict(length=config.length)
  if task.startswith("niah") or task == "variable_tracking":
    options["kind"] = config.filler
  module = tasks_needles if hasattr(tasks_needles, task) else tasks_counting
  make = getattr(module, task)
  return functools.partial(make, filler.Encoder(tokenizer), **options)


def examples(config: Config, draw: Draw, seed: int) -> list[tasks.Example]:
  """Draws the examples of a seed."""
  generator = np.random.default_rng([seed, 1])
  return [draw(generator) for _ in range(config.batch_size)]


def texts(
    config: Config, tokenizer: tokenizer_lib.Tokenizer, data_dir: str | None
) -> list[Int[np.ndarray, "B T"]]:
  """Returns what perplexity is measured on, a batch for each seed.

  Files make one batch. Windows of a corpus lie side by side without overlap in
  its test text; seeds draw without replacement, so that none is read twice.

  Raises:
    UserError: A file or corpus is not there, or too short.
  """
  if config.texts:
    # The flag was cut at its commas, of which a path may have some itself.
    paths = json_file.split_paths(",".join(config.texts))
    return [np.stack([_first(config, tokenizer, path) for path in paths])]
  corpus = corpus_lib.load(
      config.corpus, tokenizer=tokenizer, data_dir=data_dir
  )
  ids = corpus.test if len(corpus.test) else corpus.valid
  windows = len(ids) // config.length
  wanted = config.num_seeds * config.batch_size
  if windows < wanted:
    raise errors.UserError(
        f"corpus={config.corpus} has {windows} windows of"
        f" length={config.length}; num_seeds={config.num_seeds} of"
        f" batch_size={config.batch_size} want {wanted}."
    )
  order = np.random.default_rng(config.first_seed).permutation(windows)
  cut = np.asarray(ids[: windows * config.length], np.int32)
  cut = cut.reshape(windows, config.length)[order[:wanted]]
  return np.split(cut, config.num_seeds)


def _first(
    config: Config, tokenizer: tokenizer_lib.Tokenizer, path: str
) -> Int[np.ndarray, "T"]:
  try:
    text = json_file.read_text(json_file.local_path(path))
  except errors.UserError as error:
    raise errors.UserError(f"texts={error}") from error
  ids = tokenizer.encode(text)[: config.length]
  if len(ids) < config.length:
    raise errors.UserError(
        f"texts={path} has {len(ids)} tokens, fewer than"
        f" length={config.length}."
    )
  return ids
