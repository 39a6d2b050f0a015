"""Requests that wait for a row, in the order in which they come."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from joma.inference.serving import batch as batches


class Request(NamedTuple):
  """What somebody wants.

  Attributes:
    prompt: Token ids; behind a prefix, those that follow it.
    max_new_tokens: At most so many.
    prefix: Of `Batch.read`, what goes before the prompt; None is nothing.
  """

  prompt: Any
  max_new_tokens: int
  prefix: batches.Prefix | None = None


def serve(
    batch: batches.Batch, requests: Iterable[Request]
) -> Iterator[tuple[int, int]]:
  """Yields (request, token) as tokens come; requests count from 0.

  A request joins as soon as a row is free, so that the batch stays full while
  there are any; they are asked for no earlier.

  Args:
    batch: Whose rows are free.
    requests: May be more than rows, and be without end.

  Raises:
    UserError: As `Batch.join` and `Batch.step`.
  """
  waiting, of_row = enumerate(requests), {}
  has_more = True
  while has_more or of_row:
    while has_more and batch.num_free:
      number, request = next(waiting, (None, None))
      if number is None or request is None:
        has_more = False
        break
      new = batch.join(*request)
      yield number, new.token
      if not new.is_last:
        of_row[new.row] = number
    for new in batch.step():
      yield of_row[new.row], new.token
      if new.is_last:
        del of_row[new.row]


def shared_length(prompts: Sequence[Any]) -> int:
  """Returns how many tokens all prompts begin with, and go on behind."""
  shortest = min(len(prompt) for prompt in prompts)
  for place in range(shortest):
    if len({int(prompt[place]) for prompt in prompts}) > 1:
      return place
  return shortest - 1
