"""The model that reads RULER's tasks, as its folder says."""

import dataclasses

from joma.inference import stop_tokens
from joma.inference.evaluation import evaluate_config
from joma.inference.evaluation import evaluate_grid
from joma.inference.evaluation import evaluate_subject
from joma.inference.evaluation.protocols import ruler_grid
from joma.inference.evaluation.ruler import hay
from joma.inference.evaluation.ruler import ruler_tasks
from joma.inference.evaluation.ruler import written as written_lib
from joma.transformer import layer_hooks
from joma.transformer import model as models
from joma.transformer.hf import pretrained
from joma.transformer.rope import absolute
from joma.transformer.text import chat_template
from joma.transformer.text import tokenizer as tokenizer_lib
from scansnap_jax.experiment import errors

Config = evaluate_config.EvaluateConfig


def check(config: Config, folder: str | None) -> None:
  """Says what cannot be before anything long begins.

  Raises:
    UserError: There is no model, tokenizer, text of hay or chat template, a
      text does not fit, or a policy or budget cannot be.
  """
  if folder is None:
    raise errors.UserError(
        "tasks=ruler reads texts: give --model, a folder with a tokenizer."
    )
  sentences, writer = hay.essay(config.ruler.essay), _writer(config, folder)
  for name in config.ruler.tasks():
    drawer = ruler_tasks.drawer(name, sentences)
    # The smallest example is enough to know whether there is room.
    ruler_tasks.check_fits(name, drawer, config.length, writer.count)
  shape = layer_hooks.over(pretrained.read_config(folder), config.attention)
  subject = evaluate_grid.Subject(model=models.Transformer(shape), params=None)
  sized = dataclasses.replace(config, budgets=config.ruler.budgets, slots=())
  evaluate_grid.check(sized, subject)
  most = max(map(config.ruler.num_new, config.ruler.tasks()))
  longest = max((config.length, *config.ruler.lengths))
  absolute.check_learned_positions(shape, longest + most)


def load(config: Config, folder: str) -> ruler_grid.Reader:
  """Reads a model, its tokenizer, and its chat template where it has one.

  Raises:
    UserError: As `pretrained.load`.
  """
  return ruler_grid.Reader(
      subject=evaluate_subject.load(config, folder),
      writer=_writer(config, folder),
      eos_ids=stop_tokens.read(folder),
  )


def _writer(config: Config, folder: str) -> written_lib.Writer:
  tokenizer = tokenizer_lib.from_folder(folder)
  return written_lib.Writer(tokenizer, _template(config, folder))


def _template(config: Config, folder: str) -> chat_template.ChatTemplate | None:
  if config.ruler.chat == "no":
    return None
  try:
    return chat_template.read(folder)
  except errors.UserError:
    if config.ruler.chat == "yes":
      raise
    return None
