"""Facts hidden in filler, to be found again.

passkey       one number in a text that repeats itself (arXiv 2305.16300)
niah_single   a word's number among sentences; niah_*: after RULER (2404.06654)
niah_multikey     other words have numbers too
niah_multivalue   a word has several numbers, all asked
niah_multiquery   several words, all asked

Each function draws one example. The gold tokens are those of the numbers asked.
"""

from collections.abc import Sequence

import numpy as np

from joma.inference.evaluation import filler
from joma.inference.evaluation import tasks
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

Piece = filler.Piece

_HAYSTACK = (
    " The sky is wide.",
    " The field is green.",
    " The road goes on.",
    " Nothing happens here.",
)


def passkey(
    encoder: filler.Encoder,
    generator: np.random.Generator,
    *,
    length: int,
    depth: float | None = None,
) -> tasks.Example:
  """Draws a five-digit key among four sentences said over and over.

  Args:
    encoder: Of texts.
    generator: Of the draws.
    length: T at most.
    depth: Where the key is told, from 0, the start, to 1; None is anywhere.

  Raises:
    UserError: `length` has no room for it.
  """
  key = _number(generator, 5)
  needle = Piece(f" The pass key is {key}. Remember {key}.", key)
  before = [Piece("There is a pass key in this text. Find it.")]
  after = [Piece(" What is the pass key? The pass key is")]
  fixed = sum(map(encoder.count, [*before, needle, *after]))
  per_round = sum(encoder.count(Piece(line)) for line in _HAYSTACK)
  room = length - len(encoder.front) - fixed
  if room < 0:
    raise errors.UserError(
        f"length={length} is too short: a pass key takes"
        f" {fixed + len(encoder.front)} tokens."
    )
  rounds = room // per_round
  place = float(generator.random()) if depth is None else depth
  first = round(place * rounds)
  hay = [Piece(line) for line in _HAYSTACK]
  text = [*before, *hay * first, needle, *hay * (rounds - first)]
  return make(encoder, text, after, (key,))


def niah_single(
    encoder: filler.Encoder,
    generator: np.random.Generator,
    *,
    length: int,
    kind: str = "sentences",
) -> tasks.Example:
  """Draws one word with its number; arguments as `needles`."""
  return needles(encoder, generator, length=length, kind=kind)


def niah_multikey(
    encoder: filler.Encoder,
    generator: np.random.Generator,
    *,
    length: int,
    num_keys: int = 4,
    kind: str = "sentences",
) -> tasks.Example:
  """Draws several words with a number each, one asked."""
  return needles(
      encoder, generator, length=length, num_keys=num_keys, kind=kind
  )


def niah_multivalue(
    encoder: filler.Encoder,
    generator: np.random.Generator,
    *,
    length: int,
    num_values: int = 4,
    kind: str = "sentences",
) -> tasks.Example:
  """Draws one word with several numbers, all asked."""
  return needles(
      encoder, generator, length=length, num_values=num_values, kind=kind
  )


def niah_multiquery(
    encoder: filler.Encoder,
    generator: np.random.Generator,
    *,
    length: int,
    num_queries: int = 4,
    kind: str = "sentences",
) -> tasks.Example:
  """Draws several words with a number each, all asked."""
  return needles(
      encoder,
      generator,
      length=length,
      num_keys=num_queries,
      num_asked=num_queries,
      kind=kind,
  )


def needles(
    encoder: filler.Encoder,
    generator: np.random.Generator,
    *,
    length: int,
    num_keys: int = 1,
    num_values: int = 1,
    num_asked: int = 1,
    kind: str = "sentences",
) -> tasks.Example:
  """Draws words with numbers, in any order among filler.

  Args:
    encoder: Of texts.
    generator: Of the draws.
    length: T at most.
    num_keys: Words.
    num_values: Numbers of each word.
    num_asked: Words that are asked, at most num_keys.
    kind: Of filler, see `filler.surround`.

  Raises:
    UserError: A number is out of range, or `length` has no room for them.
  """
  require.between("num_keys", num_keys, 1, len(filler.WORDS))
  require.at_least("num_values", num_values, 1)
  require.between("num_asked", num_asked, 1, num_keys)
  chosen = generator.choice(len(filler.WORDS), num_keys, replace=False)
  words = [filler.WORDS[i] for i in chosen]
  asked = words[:num_asked]
  told, answers = _tell(generator, words, asked, num_values)
  order = generator.permutation(len(told))
  told = [told[i] for i in order]
  before = [Piece("Some words have numbers. Remember them.")]
  several = num_values * num_asked > 1
  what = f"{'numbers' if several else 'number'} of the {_listed(asked)}"
  verb = "are" if several else "is"
  after = [Piece(f" What {verb} the {what}? The {what} {verb}")]
  text = filler.surround(
      encoder,
      generator,
      before,
      told,
      after,
      length=length,
      kind=kind,
  )
  return make(encoder, text[: -len(after)], after, tuple(answers))


def _tell(
    generator: np.random.Generator,
    words: Sequence[str],
    asked: Sequence[str],
    num_values: int,
) -> tuple[list[Piece], list[str]]:
  """Says the numbers of words; those that are asked are gold and answers."""
  told, answers = [], []
  for word in words:
    for _ in range(num_values):
      number = _number(generator, 5)
      is_asked = word in asked
      answers += [number] * is_asked
      told.append(
          Piece(
              f" The number of the {word} is {number}.",
              number if is_asked else "",
          )
      )
  return told, answers


def make(
    encoder: filler.Encoder,
    context: Sequence[Piece],
    question: Sequence[Piece],
    answers: tuple[str, ...],
    *,
    between: str = ",",
) -> tasks.Example:
  """Makes an example of one question at the end of a text.

  Args:
    encoder: Of texts.
    context: What is read first.
    question: What follows it.
    answers: Each must occur in the continuation.
    between: What stands between them there, for the count of its tokens.
  """
  tokens, gold = encoder.join([*context, *question])
  num_context = len(encoder.join(context)[0])
  answer = encoder.encode(" " + f"{between} ".join(answers))
  query = tasks.Query(position=len(tokens) - 1, answer=answer, gold=gold)
  return tasks.Example(
      tokens=tokens,
      queries=(query,),
      num_context=num_context,
      answers=answers,
  )


def _number(generator: np.random.Generator, digits: int) -> str:
  return str(generator.integers(10 ** (digits - 1), 10**digits))


def _listed(words: Sequence[str]) -> str:
  if len(words) == 1:
    return words[0]
  return f"{', the '.join(words[:-1])} and the {words[-1]}"
