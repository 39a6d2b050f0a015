"""Aggregation: the most common words of a list, the most frequent of a code.

RULER (arXiv 2404.06654), section 3.3.
"""

import string

import numpy as np

from joma.inference.evaluation.ruler import sample as sample_lib
from joma.inference.evaluation.ruler import vocabulary

# Entries of the worked example of common words.
_SHOWN = 30
# Times that common words and others occur where there is room.
_COMMON, _OTHER = 30, 3
_DOTS = "...."


def common(
    generator: np.random.Generator,
    size: int,
    *,
    num_common: int = 10,
    shows: bool = True,
) -> sample_lib.Sample:
  """Draws a numbered list in which ten words are more common than the others.

  They occur 30 times, the others three times; in a short list both numbers
  shrink in proportion.

  Args:
    generator: Of all draws.
    size: Entries of the list; at least three a common word.
    num_common: Words that are asked.
    shows: Whether a worked example comes first.
  """
  before = ""
  if shows:
    shown = common(generator, _SHOWN, num_common=num_common, shows=False)
    before = f"{shown.text} {_numbered(list(shown.answers))}\n\n"
  times, other = _times(size, num_common)
  num_others = max((size - num_common * times) // other, 0)
  words = vocabulary.words(generator, num_common + num_others)
  asked, others = words[:num_common], words[num_common:]
  entries = [*asked * times, *others * other]
  entries = [entries[i] for i in generator.permutation(len(entries))]
  return sample_lib.Sample(
      context=(
          f"{before}Below is a numbered list of words. In these words, some"
          " appear more often than others. Memorize the ones that appear most"
          f" often.\n{_numbered(entries)}"
      ),
      question=(
          f"\nQuestion: What are the {num_common} most common words in the"
          " above list?"
      ),
      prefix=(
          f" Answer: The top {num_common} words that appear most often in the"
          " list are:"
      ),
      answers=tuple(asked),
  )


def _times(size: int, num_common: int) -> tuple[int, int]:
  """How often common words occur, and others, in a list of `size` entries.

  There are as many others as common words at least.
  """
  least = num_common * (_COMMON + _OTHER)
  if size >= least:
    return _COMMON, _OTHER
  other = max(size * _OTHER // least, 1)
  return max(size // num_common - other, other + 1), other


def _numbered(words: list[str]) -> str:
  return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def frequent(
    generator: np.random.Generator,
    size: int,
    *,
    alpha: float = 2.0,
    num_asked: int = 3,
) -> sample_lib.Sample:
  """Draws coded words with frequencies of a zeta law; the most frequent count.

  The word of rank r occurs size r^-alpha / zeta(alpha) times, rounded down; the
  first rank is dots, which are to be passed over.

  Args:
    generator: Of all draws.
    size: Words, about; at least 60, that the asked ones differ.
    alpha: Exponent.
    num_asked: Words that are asked.
  """
  ranks = np.arange(1.0, size + 1)
  weights = ranks**-alpha
  counts = np.floor(size * weights / weights.sum()).astype(int)
  counts = counts[counts > 0]
  coded = vocabulary.letters(
      generator, len(counts) - 1, 6, string.ascii_lowercase
  )
  words = [_DOTS, *coded]
  entries = np.repeat(np.arange(len(words)), counts)
  text = " ".join(words[i] for i in generator.permutation(entries))
  asked = words[1 : num_asked + 1]
  return sample_lib.Sample(
      context=(
          "Read the following coded text and track the frequency of each coded"
          f" word. Find the {_word(num_asked)} most frequently appeared coded"
          f" words. {text}"
      ),
      question=(
          "\nQuestion: Do not provide any explanation. Please ignore the dots"
          f" '....'. What are the {_word(num_asked)} most frequently appeared"
          " words in the above coded text?"
      ),
      prefix=(
          " Answer: According to the coded text above, the"
          f" {_word(num_asked)} most frequently appeared words are:"
      ),
      answers=tuple(asked),
  )


def _word(number: int) -> str:
  return {1: "one", 2: "two", 3: "three"}.get(number, str(number))
