"""Tokens at which a model says that its text is over."""

import json
import os
import pathlib

from scansnap_jax.experiment import errors


def read(folder: str | os.PathLike[str]) -> tuple[int, ...]:
  """Returns `eos_token_id` of a Hugging Face folder, () where there is none.

  generation_config.json, whose purpose it is, goes before config.json.

  Raises:
    UserError: If a file is not JSON, or the value is neither id nor list of
      ids.
  """
  for name in ("generation_config.json", "config.json"):
    path = pathlib.Path(folder) / name
    if not path.is_file():
      continue
    try:
      value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except ValueError as error:
      raise errors.UserError(f"{path} is not JSON: {error}") from error
    if value is None:
      continue
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
      raise errors.UserError(
          f"{path}: eos_token_id must be an id or a list of ids, got {value!r}."
      )
    return tuple(ids)
  return ()
