"""The 13 tasks by name: how they are drawn, and how long their answers are."""

from collections.abc import Callable, Sequence
import functools

import numpy as np

from joma.inference.evaluation.ruler import needles
from joma.inference.evaluation.ruler import questions
from joma.inference.evaluation.ruler import ruler_config
from joma.inference.evaluation.ruler import sample as sample_lib
from joma.inference.evaluation.ruler import tracking
from joma.inference.evaluation.ruler import word_counts
from scansnap_jax.experiment import errors

# Draws an example of a size: pieces of hay, entries, passages.
Draw = Callable[[np.random.Generator, int], sample_lib.Sample]
_OTHERS: dict[str, Draw] = {
    "vt": tracking.draw,
    "cwe": word_counts.common,
    "fwe": word_counts.frequent,
    "qa_1": questions.one_hop,
    "qa_2": questions.two_hops,
}
# Below these sizes a task is none; above the other, names run out.
_LEAST = {"cwe": 30, "fwe": 60}
_MOST = {"qa_1": questions.most(), "qa_2": questions.most(), "cwe": 25_000}


def drawer(name: str, essay: Sequence[str], depth: float | None = None) -> Draw:
  """Returns what draws an example of a task.

  Args:
    name: Of `ruler_config.ANSWER_TOKENS`.
    essay: Sentences of hay that is an essay.
    depth: Where needles go, from 0 to 1; None is anywhere.
  """
  if name in _OTHERS:
    return _OTHERS[name]
  task = needles.TASKS[name]
  return functools.partial(needles.draw, task=task, essay=essay, depth=depth)


def check_fits(
    name: str,
    draw: Draw,
    length: int,
    count: Callable[[sample_lib.Sample], int],
) -> None:
  """Raises UserError unless the smallest example has at most `length` tokens.

  Args:
    name: The task's.
    draw: Of the task.
    length: Tokens at most.
    count: Returns the tokens of an example.
  """
  smallest = draw(np.random.default_rng(0), _LEAST.get(name, 1))
  if (needed := count(smallest)) > length:
    raise errors.UserError(
        f"length={length} is too short for {name}, whose smallest text takes"
        f" about {needed} tokens."
    )


def fitted(
    name: str,
    draw: Draw,
    seed: Sequence[int],
    length: int,
    count: Callable[[sample_lib.Sample], int],
) -> sample_lib.Sample:
  """Draws the largest example that has at most `length` tokens.

  The same seed draws the same example, whatever sizes were tried.

  Args:
    name: The task's.
    draw: Of the task.
    seed: Of the example.
    length: Tokens at most.
    count: Returns the tokens of an example.

  Raises:
    UserError: Not even the smallest one fits.
  """
  least = _LEAST.get(name, 1)
  most = _MOST.get(name, ruler_config.MOST_PIECES)
  make = lambda size: draw(np.random.default_rng(list(seed)), size)
  if (needed := count(make(least))) > length:
    raise errors.UserError(
        f"length={length} is too short for {name}, whose smallest text takes"
        f" {needed} tokens."
    )
  # Sizes are doubled first: long texts are slow to count.
  step = least
  while least + step <= most and count(make(least + step)) <= length:
    least, step = least + step, 2 * step
  while step > 1:
    step //= 2
    if least + step <= most and count(make(least + step)) <= length:
      least += step
  return make(least)
