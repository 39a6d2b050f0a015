"""How much longer than a text a tokenizer's rules may make it.

A few rules that replace a letter by several of them, one after the other, make
a prompt of a line into gigabytes. Imports no jax.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from scansnap_jax.experiment.errors import UserError

# No tokenizer known comes near: their rules write a character for a character.
_MOST = 64


def check(fields: Mapping[str, Any]) -> None:
  """Raises UserError if a tokenizer.json asks for unbounded growth.

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


def _rules(step: object) -> Iterator[Mapping[str, Any]]:
  """Yields the replacements of a step, in the order of their application."""
  if not isinstance(step, Mapping):
    return
  if step.get("type") == "Replace":
    yield step
  for parts in ("normalizers", "pretokenizers", "decoders"):
    for part in step.get(parts) or ():
      yield from _rules(part)
