"""Tokens at which a model says that its text is over."""

import os

from joma.transformer.hf import hub
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file


def read(folder: str | os.PathLike[str]) -> tuple[int, ...]:
  """Returns `eos_token_id` of a Hugging Face folder, () where there is none.

  generation_config.json, whose purpose it is, goes before config.json.

  Raises:
    UserError: If a file is no JSON object, or the value is neither id nor list
      of ids.
  """
  for name in ("generation_config.json", "config.json"):
    path = hub.folder(folder) / name
    if not path.exists():
      continue
    value = json_file.read_object(path).get("eos_token_id")
    if value is None:
      continue
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
      raise errors.UserError(
          f"{path}: eos_token_id must be an id from 0 to 2147483647, or a list"
          f" of such ids, got {value!r:.80}."
      )
    return tuple(ids)
  return ()
