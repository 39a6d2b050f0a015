"""How RULER scores an answer: which of the strings occur, case aside."""

from collections.abc import Sequence


def score(said: str, answers: Sequence[str], *, any_counts: bool) -> float:
  """Returns the share of the answers that were said.

  Args:
    said: What was generated.
    answers: Strings to be found in it.
    any_counts: Whether one of them is enough, as with questions; else all of
      them count alike.
  """
  said = said.lower()
  found = [answer.lower() in said for answer in answers]
  return float(any(found)) if any_counts else sum(found) / len(found)
