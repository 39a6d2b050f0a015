"""Prompts as arrays of token ids: what is no id is refused in one sentence.

Letters: B prompts, T tokens after padding.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
import numpy as np

from joma.transformer import config as configs
from scansnap_jax.experiment import errors

Prompts = Sequence[Sequence[int] | np.ndarray]


def lengths_of(
    prompts: Sequence[Any], config: configs.TransformerConfig
) -> Int[np.ndarray, "B"]:
  """Returns the tokens of each prompt.

  Raises:
    UserError: If there is no prompt, or one that is empty, is no row of
      integers, or has an id outside of the vocabulary.
  """
  if not len(prompts):
    raise errors.UserError("There is no prompt to continue: give at least one.")
  for row, prompt in enumerate(prompts):
    _check_are_ids(row, prompt)
    if not len(prompt):
      raise errors.UserError(
          f"Prompt {row} has no tokens: a continuation needs at least one."
      )
    if not (0 <= np.min(prompt) and np.max(prompt) < config.vocab_size):
      raise errors.UserError(
          f"Prompt {row} has token ids from {np.min(prompt)} to"
          f" {np.max(prompt)}; the model knows 0 to {config.vocab_size - 1}."
      )
  return np.array([len(prompt) for prompt in prompts], np.int32)


def padded(prompts: Prompts, seq_len: int) -> Int[np.ndarray, "B T"]:
  """Returns the prompts, zeros at their ends."""
  rows = np.zeros((len(prompts), seq_len), np.int32)
  for row, prompt in zip(rows, prompts, strict=True):
    row[: len(prompt)] = prompt
  return rows


def _check_are_ids(row: int, prompt: object) -> None:
  if isinstance(prompt, str):
    raise errors.UserError(
        f"Prompt {row} is the text {prompt!r:.40}: give token ids, as"
        " tokenizer.encode returns them."
    )
  array = np.asarray(prompt)
  if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
    raise errors.UserError(
        f"Prompt {row} must be one row of integers, token ids, got"
        f" {array.dtype} of shape {array.shape}."
    )
