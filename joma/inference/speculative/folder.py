"""A draft's model from a Hugging Face folder."""

import pathlib
import sys

from jaxtyping import PyTree

from joma.inference.speculative import draft_config
from joma.inference.speculative import drafts
from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.hf import pretrained
from joma.transformer.text import tokenizer as tokenizers


def read(
    folder: str | pathlib.Path,
    config: draft_config.Model,
    dtype: str,
    target: configs.TransformerConfig,
    tokenizer: tokenizers.Tokenizer,
) -> tuple[drafts.Draft, PyTree]:
  """Returns a draft and its parameters.

  Says so on stderr if its tokenizer is not the model's, whose guesses then mean
  other texts; what is drawn is right all the same.

  Args:
    folder: Of the draft's model.
    config: What a flag says.
    dtype: Of parameters and products.
    target: Of the model whose tokens are guessed.
    tokenizer: Of that model.

  Raises:
    UserError: If it cannot guess for the model, before weights are read.
  """
  own = pretrained.read_config(folder)
  drafts.of(config, models.Transformer(own)).check(target, 1)
  if tokenizers.from_folder(folder).to_json() != tokenizer.to_json():
    print(
        f"note: the tokenizer of {folder} is not the model's, so that its"
        " guesses may be of other texts.",
        file=sys.stderr,
    )
  own, params = pretrained.load(folder, dtype)
  return drafts.of(config, models.Transformer(own, dtype)), params
