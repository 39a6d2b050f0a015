"""Folders of models by their names on Hugging Face: `org/name[@revision]`.

Through huggingface_hub (the extra `hf`), whose cache, token, endpoint and
offline variables hold: HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE. A folder that is there is never looked for elsewhere. Weights
are read from safetensors alone, so that nothing else of a model is downloaded.
Imports no jax.
"""

import functools
import importlib
import os
import pathlib
import re
import sys
from typing import Any

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file

_NAME = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?")
# What is read of a folder besides its weights.
_SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
)


def folder(
    name: str | os.PathLike[str], *, weights: bool = False
) -> pathlib.Path:
  """Returns the folder that a name means, downloaded where it must be.

  Args:
    name: A folder, or `org/name[@revision]` where there is no such folder.
    weights: Whether the weights are wanted, too.

  Returns:
    The folder. It need not be there, unless it was downloaded.

  Raises:
    UserError: If a name of Hugging Face cannot be had: there is no model or
      revision of that name, it is private, there is no network, or the download
      broke off.
  """
  path = json_file.local_path(name)
  found = _NAME.fullmatch(os.fspath(name))
  if found is None or path.exists():
    return path
  return _download(found["id"], found["revision"], weights)


def existing(
    name: str | os.PathLike[str], *, weights: bool = False
) -> pathlib.Path:
  """Returns the folder that a name means, as `folder`; it is there.

  Raises:
    UserError: As `folder`, and if there is no such folder or it is a file.
  """
  path = folder(name, weights=weights)
  if not path.exists():
    raise errors.UserError(
        f"There is no folder {path}. Give one with config.json, tokenizer.json"
        " and safetensors files, or a name on Hugging Face, as org/name."
    )
  if not path.is_dir():
    raise errors.UserError(
        f"{path} is a file: give the folder that it lies in."
    )
  return path


def contents(path: pathlib.Path) -> str:
  """Lists the first dozen files of a folder in which one is missing.

  Returns:
    Their names; of a GGUF file, which is no folder of a model, also the call of
    transformers that makes one.
  """
  names = sorted(each.name for each in path.iterdir())
  listing = ", ".join(names[:12]) or "nothing"
  gguf = next((name for name in names if name.endswith(".gguf")), None)
  if gguf is None:
    return listing
  return (
      f"{listing}. Of {gguf} transformers makes such a folder:"
      f" AutoModelForCausalLM.from_pretrained({str(path)!r},"
      f" gguf_file={gguf!r}).save_pretrained(FOLDER), and AutoTokenizer alike"
  )


@functools.cache  # What a run reads is of one commit, and is asked for once.
def _download(name: str, revision: str | None, weights: bool) -> pathlib.Path:
  try:
    # Imported here: an extra that local folders do without.
    hub = importlib.import_module("huggingface_hub")
  except ImportError as error:
    raise errors.UserError(
        f"There is no folder {name}. To read the model of that name from"
        " Hugging Face: pip install 'scansnap-jax[hf]'"
    ) from error
  patterns = [*_SMALL, *(["*.safetensors"] if weights else [])]
  hub_errors = importlib.import_module("huggingface_hub.errors")
  try:
    path = hub.snapshot_download(
        name,
        revision=revision,
        allow_patterns=patterns,
        ignore_patterns=["*/*"],  # Other forms of the same weights.
    )
  except hub_errors.HFValidationError as error:
    raise errors.UserError(
        f"There is no folder {name}, and it is no name that Hugging Face knows:"
        f" {_first_line(error)}"
    ) from error
  except (hub_errors.HTTPError, OSError) as error:
    raise errors.UserError(_reason(hub, name, revision, error)) from error
  path = pathlib.Path(path)
  if weights:
    print(f"note: {name} is commit {path.name}, in {path}.", file=sys.stderr)
  return path


def _reason(hub: Any, name: str, revision: str | None, error: Exception) -> str:
  """Says in one sentence why a model cannot be had, and what would help."""
  hub_errors = importlib.import_module("huggingface_hub.errors")
  constants = importlib.import_module("huggingface_hub.constants")
  where = constants.ENDPOINT
  here = f"There is no folder {name}, and"
  command = f"hf download {name}" + (
      f" --revision {revision}" if revision else ""
  )
  if isinstance(error, hub_errors.RevisionNotFoundError):
    return (
        f"{name} has no revision {revision or 'main'} at {where}: give one of"
        " its branches, tags or commits behind the @."
    )
  if isinstance(error, hub_errors.GatedRepoError):
    return (
        f"{here} {name} at {where} is gated: ask for access on its page, then"
        " log in by `hf auth login` or set HF_TOKEN."
    )
  if isinstance(error, hub_errors.RepositoryNotFoundError):
    if hub.get_token() is None:
      return (
          f"{here} {where} has no model {name}, or it is private: check the"
          " name; for a private one log in by `hf auth login` or set HF_TOKEN."
      )
    return (
        f"{here} {where} has no model {name}, or the token that is set may not"
        " read it: check the name, or log in by `hf auth login`."
    )
  if isinstance(error, hub_errors.LocalEntryNotFoundError):
    offline = constants.HF_HUB_OFFLINE
    why = "HF_HUB_OFFLINE is set" if offline else f"{where} does not answer"
    return (
        f"{here} the model {name} is not whole in {constants.HF_HUB_CACHE},"
        f" while {why}: where there is a network run `{command}`."
    )
  return (
      f"The download of {name} from {where} broke off ({_first_line(error)}):"
      " give the command again, which keeps the files that are whole."
  )


def _first_line(error: Exception) -> str:
  """What an error says, cut to a line."""
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0].rstrip(".")
