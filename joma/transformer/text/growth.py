"""How much longer than a text a tokenizer's rules may make it.

A few rules that replace a letter by several of them, one after the other, make
a prompt of a line into gigabytes; so does a rule that writes a million letters
before it. Imports no jax.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from scansnap_jax.experiment.errors import UserError

# No tokenizer known comes near: their rules write a character for a character.
_MOST = 64
# Characters or tokens that are added to a text; known ones add one or two.
_MOST_ADDED = 64


def check(fields: Mapping[str, Any]) -> None:
  """Raises UserError if a tokenizer.json makes texts much longer.

  Args:
    fields: The file as a dictionary.
  """
  for name in ("normalizer", "pre_tokenizer", "decoder"):
    factor = bound(fields.get(name))
    if factor > _MOST:
      raise UserError(
          f"its {name} may make a text {factor:.3g} times as long; at most"
          f" {_MOST} times are read."
      )
  for name in ("normalizer", "post_processor"):
    num_added = added(fields.get(name))
    if num_added > _MOST_ADDED:
      kind = "characters" if name == "normalizer" else "tokens"
      raise UserError(
          f"its {name} adds {num_added} {kind} to each text; at most"
          f" {_MOST_ADDED} are read."
      )


def bound(step: object) -> float:
  """How many times as long a step and its parts make a text at most.

  A rule multiplies what earlier ones wrote only if it finds some of it: rules
  for different letters do not add up.
  """
  written: list[tuple[str, float]] = []
  for rule in _rules(step):
    pattern, content = rule.get("pattern"), str(rule.get("content", ""))
    text = pattern.get("String") if isinstance(pattern, Mapping) else None
    # An expression may match the empty text too, at every place.
    factor = len(content) / len(text) if text else len(content) + 1
    before = [
        earlier
        for letters, earlier in written
        if not text or set(text) & set(letters)
    ]
    factor = max(factor, 1.0) * max(before, default=1.0)
    written.append((content, min(factor, 1e300)))
  return max((factor for _, factor in written), default=1.0)


def added(step: object) -> int:
  """How many characters, or tokens, a step and its parts add to any text."""
  return sum(
      len(str(part.get("prepend", ""))) + _special_tokens(part)
      for part in _parts(step)
  )


def _special_tokens(template: Mapping[str, Any]) -> int:
  """Tokens that a template puts around one text."""
  named = template.get("special_tokens")
  pieces = template.get("single")
  if not isinstance(named, Mapping) or not isinstance(pieces, list):
    return 0
  count = 0
  for piece in pieces:
    special = piece.get("SpecialToken") if isinstance(piece, Mapping) else None
    name = special.get("id") if isinstance(special, Mapping) else None
    token = named.get(name) if isinstance(name, str) else None
    ids = token.get("ids") if isinstance(token, Mapping) else None
    count += len(ids) if isinstance(ids, list) else 0
  return count


def _rules(step: object) -> Iterator[Mapping[str, Any]]:
  """Yields the replacements of a step, in the order of their application."""
  return (part for part in _parts(step) if part.get("type") == "Replace")


def _parts(step: object) -> Iterator[Mapping[str, Any]]:
  """Yields a step and all below it, in the order of their application."""
  if not isinstance(step, Mapping):
    return
  yield step
  for parts in ("normalizers", "pretokenizers", "decoders", "processors"):
    below = step.get(parts)
    for part in below if isinstance(below, list) else ():
      yield from _parts(part)
