"""Needles in a haystack: one, several keys, several values, several questions.

RULER (arXiv 2404.06654), section 3.1: a needle says `One of the special magic
numbers for KEY is: VALUE.`; keys and values are words, numbers of seven digits,
or uuids.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Literal

import numpy as np

from joma.inference.evaluation.ruler import hay
from joma.inference.evaluation.ruler import sample as sample_lib
from joma.inference.evaluation.ruler import vocabulary

Kind = Literal["words", "numbers", "uuids"]
_DRAWN: dict[Kind, Callable[[np.random.Generator, int], list[str]]] = {
    "words": vocabulary.keys,
    "numbers": vocabulary.numbers,
    "uuids": vocabulary.uuids,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles:
  """A task of needles.

  Attributes:
    hay: What they lie in.
    keys: Kind of what values belong to.
    values: Kind of what is asked.
    num_keys: Keys that are hidden.
    num_values: Values of each.
    num_asked: Keys that are asked, at most num_keys.
  """

  hay: hay.Kind
  keys: Kind = "words"
  values: Kind = "numbers"
  num_keys: int = 1
  num_values: int = 1
  num_asked: int = 1


TASKS = {
    "niah_single_1": Needles(hay="noise"),
    "niah_single_2": Needles(hay="essay"),
    "niah_single_3": Needles(hay="essay", values="uuids"),
    "niah_multikey_1": Needles(hay="essay", num_keys=4),
    "niah_multikey_2": Needles(hay="needle"),
    "niah_multikey_3": Needles(hay="needle", keys="uuids", values="uuids"),
    "niah_multivalue": Needles(hay="essay", num_values=4),
    "niah_multiquery": Needles(hay="essay", num_keys=4, num_asked=4),
}


def draw(
    generator: np.random.Generator,
    size: int,
    task: Needles,
    essay: Sequence[str],
    depth: float | None = None,
) -> sample_lib.Sample:
  """Draws an example.

  Args:
    generator: Of all draws.
    size: Pieces of hay.
    task: Which.
    essay: Sentences of hay that is an essay.
    depth: Where needles go, from 0, the start, to 1; None is anywhere.
  """
  keys = _DRAWN[task.keys](generator, task.num_keys)
  values = _DRAWN[task.values](generator, task.num_keys * task.num_values)
  of_key = np.reshape(values, (task.num_keys, task.num_values)).tolist()
  needles = [
      _needle(task, key, value)
      for key, mine in zip(keys, of_key, strict=True)
      for value in mine
  ]
  needles = [needles[i] for i in generator.permutation(len(needles))]

  def other() -> str:
    (key,) = _DRAWN[task.keys](generator, 1)
    (value,) = _DRAWN[task.values](generator, 1)
    # A key that is asked has no other value.
    return other() if key in keys else _needle(task, key, value)

  pieces = hay.draw(generator, task.hay, size, essay, other)
  between = " " if task.hay == "essay" else "\n"
  text = hay.hide(generator, pieces, needles, between=between, depth=depth)
  answers = [value for mine in of_key[: task.num_asked] for value in mine]
  return _ask(task, text, keys[: task.num_asked], answers)


def _needle(task: Needles, key: str, value: str) -> str:
  return f"One of the special magic {task.values} for {key} is: {value}."


def _ask(
    task: Needles, text: str, asked: Sequence[str], answers: Sequence[str]
) -> sample_lib.Sample:
  """Says what is to be remembered, the text, and the question."""
  one = len(answers) == 1
  what = task.values.removesuffix("s") if one else task.values
  some, verb = ("A", "is") if one else ("Some", "are")
  for_ = f"for {_listed(asked)} mentioned in the provided text"
  all_ = "is the" if one else "are all the"
  return sample_lib.Sample(
      context=(
          f"{some} special magic {what} {verb} hidden within the following"
          " text. Make sure to memorize it. I will quiz you about the"
          f" {what} afterwards.\n{text}"
      ),
      question=f"\nWhat {all_} special magic {what} {for_}?",
      prefix=f" The special magic {what} {for_} {verb}",
      answers=tuple(answers),
  )


def _listed(words: Sequence[str]) -> str:
  if len(words) == 1:
    return words[0]
  return f"{', '.join(words[:-1])}, and {words[-1]}"
