"""The chat template of a model's folder: messages to the text that it knows.

Templates are programs in Jinja that come with a model, written by anybody. They
run in a sandbox: no attributes of Python's own, no change of what they are
given, bounded loops over ranges, bounded repetitions.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import datetime
import importlib
import json
import os
import pathlib
from typing import Any

from joma.transformer.hf import hub
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file

Messages = Sequence[Mapping[str, str]]

# A template that a person wrote needs a thousandth of each.
_MOST_TURNS = 1_000_000
_MOST_CHARACTERS = 10_000_000


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A compiled template.

  Attributes:
    source: Of which file, for messages.
    template: Jinja's.
    tokens: Special tokens by the names that templates use, as `bos_token`.
  """

  source: str
  template: Any
  tokens: Mapping[str, str]

  def render(self, messages: Messages) -> str:
    """Returns the text of messages, up to where the assistant's turn begins.

    Args:
      messages: Each with `role` and `content`.

    Raises:
      UserError: The template refuses them, or fails.
    """
    options: dict[str, Any] = dict(
        messages=[dict(message) for message in messages],
        add_generation_prompt=True,
        **self.tokens,
    )
    try:
      pieces, length = [], 0
      for piece in self.template.generate(**options):
        pieces.append(piece)
        length += len(piece)
        if length > _MOST_CHARACTERS:
          raise ValueError(f"it makes more than {_MOST_CHARACTERS} characters")
      return "".join(pieces)
    except Exception as error:  # A template raises whatever it likes.
      raise errors.UserError(
          f"The chat template of {self.source} fails: {error}"
      ) from error


def read(folder: str | os.PathLike[str]) -> ChatTemplate:
  """Returns the chat template of a Hugging Face folder.

  That is chat_template.jinja, or `chat_template` in tokenizer_config.json or
  chat_template.json: a text, or a list of which the one named `default` is
  taken.

  Raises:
    UserError: There is none, it is no template, or Jinja is not installed.
  """
  folder = hub.folder(folder)
  path = folder / "tokenizer_config.json"
  config = json_file.read_object(path) if path.exists() else {}
  source, text = _find(folder, config)
  try:
    template = _sandbox().from_string(text)
  except errors.UserError:
    raise
  except Exception as error:  # Jinja's errors, and Python's of its own code.
    raise errors.UserError(
        f"The chat template of {source} is no Jinja template: {error}"
    ) from error
  return ChatTemplate(str(source), template, _tokens(config))


def _find(
    folder: pathlib.Path, config: Mapping[str, Any]
) -> tuple[pathlib.Path, str]:
  path = folder / "chat_template.jinja"
  if path.exists():
    return path, json_file.read_text(path)
  path, found = folder / "tokenizer_config.json", config.get("chat_template")
  other = folder / "chat_template.json"
  if found is None and other.exists():
    path, found = other, json_file.read_object(other).get("chat_template")
  if isinstance(found, list):
    named = {
        entry.get("name"): entry.get("template")
        for entry in found
        if isinstance(entry, dict)
    }
    found = named.get("default")
  if not isinstance(found, str):
    raise errors.UserError(
        f"{folder} has no chat template: --chat needs chat_template.jinja, or"
        " chat_template in tokenizer_config.json, which models that were"
        " trained to chat bring along."
    )
  return path, found


def _tokens(config: Mapping[str, Any]) -> dict[str, str]:
  """Returns special tokens, which are written as texts or as objects."""
  tokens = {}
  for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
    value = config.get(name)
    value = value.get("content") if isinstance(value, dict) else value
    tokens[name] = value if isinstance(value, str) else ""
  return tokens


def _sandbox() -> Any:
  """Returns Jinja's environment, as such templates expect it."""
  try:
    # Imported here: an extra that only chats need.
    sandbox = importlib.import_module("jinja2.sandbox")
  except ImportError as error:
    raise errors.UserError(
        "Chat templates need Jinja: pip install 'scansnap-jax[hf]'"
    ) from error

  class Bounded(sandbox.ImmutableSandboxedEnvironment):
    """Counts the turns of loops over ranges, and bounds repetitions."""

    intercepted_binops = frozenset(["*", "**", "<<"])

    def call_binop(
        self, context: Any, operator: str, left: Any, right: Any
    ) -> Any:
      sizes = [
          len(x) if isinstance(x, str | list) else x for x in (left, right)
      ]
      if operator != "*" or sizes[0] * sizes[1] > _MOST_CHARACTERS:
        raise ValueError(f"it asks for {left!r:.20} {operator} {right!r:.20}")
      return left * right

  environment = Bounded(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=["jinja2.ext.loopcontrols"],
  )
  environment.filters["tojson"] = _to_json
  environment.globals.update(
      range=_bounded_range(),
      raise_exception=_refuse,
      strftime_now=lambda form: datetime.datetime.now().strftime(form),
  )
  return environment


def _bounded_range() -> Any:
  left = [_MOST_TURNS]

  def bounded(*arguments: int) -> range:
    """As Python's, until all ranges together are too long."""
    turns = range(*arguments)
    left[0] -= len(turns)
    if left[0] < 0:
      raise ValueError(f"its loops take more than {_MOST_TURNS} turns")
    return turns

  return bounded


def _refuse(message: str) -> None:
  raise ValueError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
  """As `json.dumps`: Jinja's own escapes what HTML would read."""
  return json.dumps(value, ensure_ascii=False, indent=indent)
