"""An example of RULER: a text, a question, and what must be said."""

from collections.abc import Sequence
import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """A text and what is asked of it.

  Attributes:
    context: What is read before anybody knows what will be asked.
    question: What follows it.
    prefix: How the answer begins.
    answers: What must occur in the answer, all of it or any.
    any_counts: Whether one of the answers is enough.
  """

  context: str
  question: str
  prefix: str
  answers: Sequence[str]
  any_counts: bool = False

  @property
  def text(self) -> str:
    """All that is read."""
    return self.context + self.question + self.prefix
