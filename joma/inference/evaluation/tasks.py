"""Tasks that say which tokens a cache must not lose.

An example is a text with queries: where each stands, what should come next, and
the gold positions, those of the tokens that hold the answer. Generators are
pure functions of a seed. Symbols for small models are in `tasks_symbols`, texts
through a tokenizer in `tasks_needles` and `tasks_counting`.

Letters: B examples, T tokens, Q queries, A answer tokens, M gold tokens.
"""

from collections.abc import Sequence
import dataclasses

from jaxtyping import Int
import numpy as np

from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
  """Something that is asked.

  Attributes:
    position: Of the token after which the answer should come.
    answer: Token ids [A] of the answer.
    gold: Positions [M], ascending, of the tokens that hold it.
  """

  position: int
  answer: Int[np.ndarray, "A"]
  gold: Int[np.ndarray, "M"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
  """A text and what is asked of it.

  Attributes:
    tokens: Ids [T]; what is read.
    queries: In the order of their positions. Only the last may have an answer
      of several tokens, which are then generated.
    num_context: Tokens before the question: what a cache may be compressed on
      without knowing what will be asked.
    answers: Texts of which each must occur in what is generated; empty where
      the ids of answers are compared.
  """

  tokens: Int[np.ndarray, "T"]
  queries: tuple[Query, ...]
  num_context: int
  answers: tuple[str, ...] = ()

  def __post_init__(self):
    if not len(self.tokens):
      raise errors.UserError("An example needs at least one token.")
    if not 1 <= self.num_context <= len(self.tokens):
      raise errors.UserError(
          f"num_context={self.num_context} must be from 1 to the"
          f" {len(self.tokens)} tokens."
      )
    for query in self.queries:
      if not 0 <= query.position < len(self.tokens):
        raise errors.UserError(
            f"A query at {query.position} is outside of the"
            f" {len(self.tokens)} tokens."
        )
      if len(query.gold) and not (
          0 <= query.gold.min() and query.gold.max() <= query.position
      ):
        raise errors.UserError("Gold positions must come before their query.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """Examples side by side, padded at their ends.

  Attributes:
    tokens: [B, T].
    lengths: [B].
    num_context: [B].
    targets: [B, T]: the first token of the answer where something is asked,
      else -1.
    gold: [B, T, M]: gold positions of the query at each token, else -1.
    num_new: Tokens of the longest answer.
  """

  tokens: Int[np.ndarray, "B T"]
  lengths: Int[np.ndarray, "B"]
  num_context: Int[np.ndarray, "B"]
  targets: Int[np.ndarray, "B T"]
  gold: Int[np.ndarray, "B T M"]
  num_new: int


def stack(examples: Sequence[Example], num_gold: int | None = None) -> Batch:
  """Puts examples together.

  Args:
    examples: At least one.
    num_gold: M, that of the most golden query or more; None is that.

  Raises:
    UserError: There is no example.
  """
  if not examples:
    raise errors.UserError("There is no example: give at least one.")
  lengths = np.array([len(e.tokens) for e in examples], np.int32)
  shape = (len(examples), int(lengths.max()))
  most = max(len(q.gold) for e in examples for q in e.queries)
  tokens = np.zeros(shape, np.int32)
  targets = np.full(shape, -1, np.int32)
  gold = np.full((*shape, max(num_gold or 0, most, 1)), -1, np.int32)
  for row, example in enumerate(examples):
    tokens[row, : lengths[row]] = example.tokens
    for query in example.queries:
      targets[row, query.position] = query.answer[0]
      gold[row, query.position, : len(query.gold)] = query.gold
  return Batch(
      tokens=tokens,
      lengths=lengths,
      num_context=np.array([e.num_context for e in examples], np.int32),
      targets=targets,
      gold=gold,
      num_new=max(len(q.answer) for e in examples for q in e.queries),
  )


def stack_alike(
    drawn: list[list[Example]],
) -> list[tuple[Batch, list[Example]]]:
  """Puts batches together in one shape, which one compilation reads.

  Args:
    drawn: As many examples a batch.
  """
  together = stack([e for examples in drawn for e in examples])
  size, batches = len(drawn[0]), []
  for seed, examples in enumerate(drawn):
    rows = slice(seed * size, (seed + 1) * size)
    part = {
        field.name: getattr(together, field.name)[rows]
        for field in dataclasses.fields(together)
        if field.name != "num_new"
    }
    batch = Batch(**part, num_new=together.num_new)
    batches.append((batch, examples))
  return batches
