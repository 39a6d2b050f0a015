"""Questions about many places of a text, after RULER (arXiv 2404.06654).

variable_tracking   x1 = 48213, x2 = x1, ...: which variables have that value?
common_words        which words of a long list occur often?
frequent_words      the most frequent words, frequencies of a zeta law
long_generation     a chain of sums: the running totals are to be written

Each function draws one example; what the gold tokens are is said there.
"""

from collections.abc import Iterable, Sequence
import itertools
import string

from jaxtyping import Int
import numpy as np

from joma.inference.evaluation import filler
from joma.inference.evaluation import tasks
from joma.inference.evaluation import tasks_needles
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

Piece = filler.Piece
# Of words with frequencies of a law, until those that are asked differ.
_MOST_DRAWS = 1000


def variable_tracking(
    encoder: filler.Encoder,
    generator: np.random.Generator,
    *,
    length: int,
    num_chains: int = 1,
    num_hops: int = 4,
    kind: str = "sentences",
) -> tasks.Example:
  """Draws chains of assignments; the variables of one value are asked.

  Gold are the statements of that chain.

  Args:
    encoder: Of texts.
    generator: Of the draws.
    length: T at most.
    num_chains: Chains, each with a value of its own.
    num_hops: Variables of a chain after its first.
    kind: Of filler, see `filler.surround`.

  Raises:
    UserError: A number is out of range, or `length` has no room for it.
  """
  require.at_least("num_chains", num_chains, 1)
  require.at_least("num_hops", num_hops, 0)
  chains = _draw_chains(generator, num_chains, num_hops + 1)
  numbers = 10_000 + generator.choice(90_000, num_chains, replace=False)
  told, depths = _tell(generator, chains, numbers)
  before = [Piece("Variables are assigned in this text. Follow them.")]
  after = [
      Piece(
          f" Which variables have the value {numbers[0]}? The variables with"
          f" the value {numbers[0]} are"
      )
  ]
  text = filler.surround(
      encoder,
      generator,
      before,
      told,
      after,
      length=length,
      kind=kind,
      depths=depths,
  )
  return tasks_needles.make(encoder, text[:-1], after, tuple(chains[0]))


def _draw_chains(
    generator: np.random.Generator, num_chains: int, per_chain: int
) -> list[list[str]]:
  """Different variables, of two letters each, for every chain.

  Raises:
    UserError: If there are not so many.
  """
  names = [
      "".join(pair)
      for pair in itertools.product(string.ascii_uppercase, repeat=2)
  ]
  chosen = generator.permutation(len(names))[: num_chains * per_chain]
  if len(chosen) < num_chains * per_chain:
    raise errors.UserError(
        f"num_chains={num_chains} of num_hops={per_chain - 1} want more than"
        f" {len(names)} variables."
    )
  return [
      [names[i] for i in chosen[c * per_chain : (c + 1) * per_chain]]
      for c in range(num_chains)
  ]


def _tell(
    generator: np.random.Generator,
    chains: list[list[str]],
    numbers: Int[np.ndarray, "chains"],
) -> tuple[list[Piece], list[float]]:
  """Assignments by their depths; those of the first chain are gold."""
  told, depths = [], []
  for chain, number in zip(chains, numbers, strict=True):
    sources = [str(number), *chain]
    for name, source in zip(chain, sources, strict=False):
      said = f"VAR {name} = {source}"
      told.append(Piece(f" {said}.", said if chain is chains[0] else ""))
    depths += np.sort(generator.random(len(chain))).tolist()
  # Chains run through each other; each keeps its order.
  order = np.argsort(depths, kind="stable")
  return [told[i] for i in order], [depths[i] for i in order]


def common_words(
    encoder: filler.Encoder,
    generator: np.random.Generator,
    *,
    length: int,
    num_common: int = 10,
    times_common: int = 30,
    times_other: int = 3,
) -> tasks.Example:
  """Draws a numbered list of words, some of which occur more often.

  As many other words as fit, times_other each. Where not even the common ones
  fit, both numbers of times shrink in proportion. Gold are all places of the
  common words.

  Args:
    encoder: Of texts.
    generator: Of the draws.
    length: T at most.
    num_common: Words that occur often, all asked.
    times_common: How often.
    times_other: How often others do.

  Raises:
    UserError: A number is out of range, or `length` has no room for it.
  """
  require.between("num_common", num_common, 1, len(filler.WORDS) // 2)
  require.at_least("times_other", times_other, 1)
  require.at_least("times_common", times_common, times_other + 1)
  words = [filler.WORDS[i] for i in generator.permutation(len(filler.WORDS))]
  common, others = words[:num_common], words[num_common:]
  before = [Piece("Words are listed here. Some occur more often.")]
  after = [_which(num_common, "common")]
  widest = [_entry(999, word, True) for word in words]
  room = _room(encoder, length, [*before, *after], widest)
  times_common, times_other = _times(
      room, num_common, times_common, times_other
  )
  if times_common <= times_other:
    raise errors.UserError(
        f"length={length} is too short for {num_common} common words."
    )
  num_others = (room - num_common * times_common) // times_other
  listed = common * times_common + others[:num_others] * times_other
  order = generator.permutation(len(listed))
  entries = [
      _entry(place, listed[i], listed[i] in common)
      for place, i in enumerate(order, start=1)
  ]
  return tasks_needles.make(encoder, [*before, *entries], after, tuple(common))


def _times(
    room: int, num_common: int, common: int, other: int
) -> tuple[int, int]:
  """How often words of both kinds occur: less in proportion without room."""
  # At least as many of the others as of the common ones.
  need = num_common * (common + other)
  if room < need:
    other = max(room * other // need, 1)
    common = room // num_common - other
  return common, other


def _which(number: int, what: str) -> Piece:
  """The question, and how its answer begins."""
  return Piece(
      f" Which {number} words are the most {what}? The most {what} words are"
  )


def _room(
    encoder: filler.Encoder,
    length: int,
    fixed: Sequence[Piece],
    entries: Iterable[Piece],
) -> int:
  """Entries that fit beside what is said anyway, were all of the widest."""
  room = length - len(encoder.front) - sum(map(encoder.count, fixed))
  return room // max(map(encoder.count, entries))


def frequent_words(
    encoder: filler.Encoder,
    generator: np.random.Generator,
    *,
    length: int,
    alpha: float = 2.0,
    num_asked: int = 3,
) -> tasks.Example:
  """Draws words with frequencies of a zeta law; the most frequent are asked.

  The word of rank r is drawn with probability in proportion to r^-alpha; draws
  in which two of the words asked are equally frequent are drawn again. Gold are
  all places of the words asked.

  Args:
    encoder: Of texts.
    generator: Of the draws.
    length: T at most.
    alpha: Exponent, above 0.
    num_asked: Words that are asked.

  Raises:
    UserError: A number is out of range, `length` has no room for it, or words
      of such frequencies hardly differ.
  """
  require.positive("alpha", alpha)
  require.between("num_asked", num_asked, 1, 10)
  words = [filler.WORDS[i] for i in generator.permutation(len(filler.WORDS))]
  before = [Piece("Words are written here, some more often than others.")]
  after = [_which(num_asked, "frequent")]
  listed = (Piece(f" {word}") for word in words)
  room = _room(encoder, length, [*before, *after], listed)
  if room < 8 * num_asked:
    raise errors.UserError(
        f"length={length} is too short to tell {num_asked} words by their"
        " frequencies."
    )
  drawn, ranked = _unlike(generator, room, len(words), alpha, num_asked)
  asked = [words[i] for i in ranked[:num_asked]]
  entries = [
      Piece(f" {words[i]}", words[i] if words[i] in asked else "")
      for i in drawn
  ]
  return tasks_needles.make(encoder, [*before, *entries], after, tuple(asked))


def _unlike(
    generator: np.random.Generator,
    room: int,
    num_words: int,
    alpha: float,
    num_asked: int,
) -> tuple[Int[np.ndarray, "room"], Int[np.ndarray, "words"]]:
  """Draws words until those asked differ in frequency, and ranks them.

  Raises:
    UserError: They do not in 1000 draws.
  """
  weights = np.arange(1, num_words + 1.0) ** -alpha
  for _ in range(_MOST_DRAWS):
    drawn = generator.choice(num_words, room, p=weights / weights.sum())
    counts = np.bincount(drawn, minlength=num_words)
    ranked = np.argsort(-counts, kind="stable")
    if (np.diff(counts[ranked[: num_asked + 1]]) < 0).all():
      return drawn, ranked
  raise errors.UserError(
      f"alpha={alpha} makes no {num_asked} words of different frequencies among"
      f" {room} in {_MOST_DRAWS} draws: use a value nearer to 2, or fewer"
      " words."
  )


def long_generation(
    encoder: filler.Encoder,
    generator: np.random.Generator,
    *,
    length: int,
    num_steps: int = 12,
) -> tasks.Example:
  """Draws numbers to be added one by one, every total to be written down.

  A worked example shows how. Gold are the numbers. What is generated has about
  eleven tokens a step, so that a small cache must drop much of it again.

  Args:
    encoder: Of texts.
    generator: Of the draws.
    length: T of the prompt at most; there is no filler.
    num_steps: Numbers.

  Raises:
    UserError: `length` has no room for it.
  """
  require.at_least("num_steps", num_steps, 1)
  shown = generator.integers(1, 10, 3).tolist()
  numbers = generator.integers(1, 10, num_steps).tolist()
  example = Piece(
      "Add the numbers one by one."
      f"\nNumbers: {_joined(shown)}.\nSums:{_sums(shown)}"
  )
  listed = Piece(f"\nNumbers: {_joined(numbers)}.", _joined(numbers))
  question = [Piece("\nSums:")]
  steps = _sums(numbers)
  said = tuple(step.strip() for step in steps.split(";") if step)
  made = tasks_needles.make(
      encoder, [example, listed], question, said, between=";"
  )
  if len(made.tokens) > length:
    raise errors.UserError(
        f"length={length} is too short for {num_steps} numbers, which take"
        f" {len(made.tokens)} tokens."
    )
  return made


def _sums(numbers: list[int]) -> str:
  """Returns ` 0 + 3 = 3; 3 + 4 = 7;`."""
  totals = itertools.accumulate(numbers)
  return "".join(
      f" {total - number} + {number} = {total};"
      for total, number in zip(totals, numbers, strict=True)
  )


def _joined(numbers: list[int]) -> str:
  return ", ".join(map(str, numbers))


def _entry(place: int, word: str, is_gold: bool) -> Piece:
  return Piece(f" {place}. {word}", word if is_gold else "")
