"""Tasks over plain symbols, for models that learn them in minutes.

mqar        multi-query associative recall (arXiv 2312.04927): pairs of key and
            value, then the keys again, among noise, each to be answered by its
            value; most follow soon, at gaps of a power law
induction   a pair somewhere, and its first half at the end
copy        a passage, noise, and the passage again, predicted token by token
count       a mark among noise, again and again: at each, how many so far?

Each function draws one example from a generator. All texts of a task have the
same length.
"""

from jaxtyping import Int
import numpy as np

from joma.inference.evaluation import tasks
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


def mqar(
    generator: np.random.Generator,
    *,
    length: int = 64,
    num_pairs: int = 8,
    vocab_size: int = 8192,
    power: float = 0.01,
) -> tasks.Example:
  """Draws an example of multi-query associative recall.

  Keys are from [1, V / 2), values from [V / 2, V), each key once. The pairs
  come first; every key is asked once, at one of the places 2 g behind them,
  g = 0, 1, ... drawn without replacement with weights (g + 1)^(power - 1). The
  rest is noise, tokens that are no key of the example.

  Args:
    generator: Of the draws.
    length: T, at least 4 num_pairs.
    num_pairs: Pairs, and queries.
    vocab_size: V, at least 2 num_pairs + 4.
    power: The smaller, the sooner most keys are asked.

  Raises:
    UserError: The sizes do not fit together.
  """
  _check_pairs(length, num_pairs, vocab_size)
  half = vocab_size // 2
  keys = 1 + generator.choice(half - 1, num_pairs, replace=False)
  values = generator.integers(half, vocab_size, num_pairs)
  num_context = 2 * num_pairs
  places = np.arange((length - num_context) // 2)
  weights = (places + 1.0) ** (power - 1)
  gaps = generator.choice(
      places, num_pairs, replace=False, p=weights / weights.sum()
  )
  tokens = _noise(generator, length, vocab_size, keys)
  tokens[0:num_context:2], tokens[1:num_context:2] = keys, values
  asked = num_context + 2 * gaps
  tokens[asked] = keys
  queries = [
      tasks.Query(
          position=int(asked[pair]),
          answer=values[pair : pair + 1].astype(np.int32),
          gold=np.array([2 * pair + 1], np.int32),
      )
      for pair in np.argsort(asked)
  ]
  return tasks.Example(
      tokens=tokens, queries=tuple(queries), num_context=num_context
  )


def _check_pairs(length: int, num_pairs: int, vocab_size: int) -> None:
  """Raises UserError where there is no room for pairs, or too few symbols."""
  require.at_least("num_pairs", num_pairs, 1)
  if length < 4 * num_pairs:
    raise errors.UserError(
        f"length={length} must be at least 4 num_pairs, {4 * num_pairs}: a pair"
        " and a place for its query each."
    )
  require.at_least("vocab_size", vocab_size, 2 * num_pairs + 4)


def induction(
    generator: np.random.Generator, *, length: int = 64, vocab_size: int = 256
) -> tasks.Example:
  """Draws noise with one pair, whose first half comes again at the end.

  Args:
    generator: Of the draws.
    length: T, at least 4.
    vocab_size: V, at least 4.

  Raises:
    UserError: A size is too small.
  """
  require.at_least("length", length, 4)
  require.at_least("vocab_size", vocab_size, 4)
  key = generator.integers(1, vocab_size, 1)
  tokens = _noise(generator, length, vocab_size, key)
  place = int(generator.integers(0, length - 2))
  tokens[[place, -1]] = key
  query = tasks.Query(
      position=length - 1,
      answer=tokens[place + 1 : place + 2].copy(),
      gold=np.array([place + 1], np.int32),
  )
  return tasks.Example(tokens=tokens, queries=(query,), num_context=length - 1)


def copy(
    generator: np.random.Generator,
    *,
    length: int = 64,
    num_copied: int = 8,
    vocab_size: int = 256,
) -> tasks.Example:
  """Draws a passage without repeats, noise, and the passage again.

  Every token of the second passage but its first is asked, which the token
  before it decides.

  Args:
    generator: Of the draws.
    length: T, at least 2 num_copied.
    num_copied: Tokens of the passage, at least 2.
    vocab_size: V, more than num_copied + 1.

  Raises:
    UserError: The sizes do not fit together.
  """
  require.at_least("num_copied", num_copied, 2)
  require.at_least("length", length, 2 * num_copied)
  require.at_least("vocab_size", vocab_size, num_copied + 2)
  passage = 1 + generator.choice(vocab_size - 1, num_copied, replace=False)
  tokens = _noise(generator, length, vocab_size, passage)
  start = length - num_copied
  tokens[:num_copied] = tokens[start:] = passage
  queries = [
      tasks.Query(
          position=start + i - 1,
          answer=passage[i : i + 1].astype(np.int32),
          gold=np.array([i], np.int32),
      )
      for i in range(1, num_copied)
  ]
  return tasks.Example(tokens=tokens, queries=tuple(queries), num_context=start)


def count(
    generator: np.random.Generator, *, length: int = 64, vocab_size: int = 64
) -> tasks.Example:
  """Draws a mark among noise, again and again: how many so far?

  The first token is 1, a mark 2, noise 3 to 5, and numbers follow. The marks of
  a text are 1 to most = min(V - 6, T - 1, 9) in number, uniform; each is asked,
  itself counted, and gold are all marks up to it.

  Args:
    generator: Of the draws.
    length: T, at least 2.
    vocab_size: V, at least 7.

  Raises:
    UserError: A size is too small.
  """
  require.at_least("length", length, 2)
  require.at_least("vocab_size", vocab_size, 7)
  most = min(vocab_size - 6, length - 1, 9)
  tokens = generator.integers(3, 6, length).astype(np.int32)
  number = int(generator.integers(1, most + 1))
  marks = 1 + np.sort(generator.choice(length - 1, number, replace=False))
  tokens[0], tokens[marks] = 1, 2
  queries = [
      tasks.Query(
          position=int(place),
          answer=np.array([6 + before], np.int32),
          gold=marks[: before + 1].astype(np.int32),
      )
      for before, place in enumerate(marks)
  ]
  return tasks.Example(
      tokens=tokens, queries=tuple(queries), num_context=int(marks[0])
  )


def _noise(
    generator: np.random.Generator,
    length: int,
    vocab_size: int,
    without: Int[np.ndarray, "_"],
) -> Int[np.ndarray, "T"]:
  allowed = np.setdiff1d(np.arange(vocab_size, dtype=np.int32), without)
  return generator.choice(allowed, length)
