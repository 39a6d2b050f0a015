"""What needles lie in: noise, an essay, or other needles."""

from collections.abc import Callable, Sequence
import functools
import pathlib
import re
from typing import Literal

import numpy as np

from joma.inference.evaluation import filler
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file

Kind = Literal["noise", "essay", "needle"]

# Said over and over, as with pass keys (arXiv 2305.16300).
NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There"
    " and back again."
)
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+")


@functools.cache
def essay(path: str = "") -> tuple[str, ...]:
  """Returns the sentences of a text file; "" is the embedded text.

  Raises:
    UserError: The file cannot be read, or has no sentence.
  """
  if path:
    text = json_file.read_text(pathlib.Path(json_file.local_path(path)))
  else:
    text = " ".join(line.strip() for line in filler.shakespeare())
  found = [
      part for part in _SENTENCE_ENDS.split(" ".join(text.split())) if part
  ]
  if not found:
    raise errors.UserError(f"ruler.essay={path} has no sentence.")
  return tuple(found)


def draw(
    generator: np.random.Generator,
    kind: Kind,
    size: int,
    sentences: Sequence[str],
    needle: Callable[[], str],
) -> list[str]:
  """Returns so many pieces of hay.

  Args:
    generator: Of the place where an essay begins.
    kind: noise repeats five sentences; essay goes through `sentences` from a
      drawn one on, round the end; needle is needles that nobody asks for.
    size: Pieces.
    sentences: Of an essay.
    needle: Draws a needle.
  """
  if kind == "noise":
    return [NOISE] * size
  if kind == "needle":
    return [needle() for _ in range(size)]
  start = int(generator.integers(len(sentences)))
  return [sentences[(start + i) % len(sentences)] for i in range(size)]


def hide(
    generator: np.random.Generator,
    pieces: Sequence[str],
    needles: Sequence[str],
    *,
    between: str,
    depth: float | None = None,
) -> str:
  """Puts needles between pieces of hay, in their order.

  Args:
    generator: Of the places.
    pieces: Hay.
    needles: What is hidden.
    between: What joins pieces: a space, or a new line.
    depth: Where all needles go, from 0, the start, to 1; None is anywhere.
  """
  if depth is None:
    places = np.sort(generator.integers(len(pieces) + 1, size=len(needles)))
  else:
    places = np.full(len(needles), round(depth * len(pieces)))
  text, last = [], 0
  for place, needle in zip(places, needles, strict=True):
    text += [*pieces[last:place], needle]
    last = place
  return between.join([*text, *pieces[last:]])
