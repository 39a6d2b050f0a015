"""Words, numbers and uuids by chance, and names of people and places.

All are made here: no list is read.
"""

import string
import uuid

import numpy as np

from joma.inference.evaluation import filler

_ADJECTIVES = tuple(
    "able amber ancient arctic bitter blunt bold brave brief bright brisk"
    " broad calm careful cheerful clever cloudy common cosmic crisp curious"
    " dapper deep distant dusty eager early earnest elegant faint famous fancy"
    " fierce final flat fluent formal fragile frank free fresh frosty gentle"
    " giant glad golden grand grave hasty hollow honest humble icy idle jolly"
    " keen kind large late lively local lonely loud lucky mellow mighty misty"
    " modest narrow neat nimble noble odd open patient plain polite proud quick"
    " quiet rapid rare round rustic scarce sharp shy silent simple sleepy slow"
    " smooth solid spare steady stern still strange sturdy subtle sunny sweet"
    " tall tame tender tidy tiny vague vast vivid warm wild wise".split()
)
_FIRST = tuple(
    "Ada Bruno Clara Dario Edith Felix Greta Hugo Irene Jonas Karin Leo Mara"
    " Nils Olga Paulo Quinn Rosa Silas Tessa Ugo Vera Wanda Xaver Yara"
    " Zeno".split()
)
_LAST = tuple(
    "Alder Brook Castell Drummond Ferrow Garland Holt Ivers Jessop Kestrel"
    " Lindqvist Marlow Norwood Ostrom Pell Quarry Rask Sorrel Thorne Underhill"
    " Vance Whitlock Yardley Zeller".split()
)
# Places are two parts: so many that no two need be alike.
_PLACE = tuple(
    "Amber Bell Corn Dun East Fair Glen Hart Ivy Kirk Lang Mill North Oak Pine"
    " Red Stone Thorn West Wood".split()
)
_OF_PLACE = tuple(
    "bridge bury dale field ford ham haven mere mouth port stead ton vale wick"
    " worth".split()
)


def words(generator: np.random.Generator, number: int) -> list[str]:
  """Draws different words: nouns, and beyond those an adjective before."""
  nouns = filler.WORDS
  if number <= len(nouns):
    return [nouns[i] for i in generator.permutation(len(nouns))[:number]]
  pairs = len(nouns) * len(_ADJECTIVES)
  chosen = generator.choice(len(nouns) + pairs, number, replace=False)
  return [
      nouns[i] if i < len(nouns) else _pair(int(i) - len(nouns)) for i in chosen
  ]


def keys(generator: np.random.Generator, number: int) -> list[str]:
  """Draws different pairs as `quiet-harbor`."""
  pairs = len(filler.WORDS) * len(_ADJECTIVES)
  chosen = generator.choice(pairs, number, replace=False)
  return [_pair(int(i)) for i in chosen]


def numbers(
    generator: np.random.Generator, number: int, digits: int = 7
) -> list[str]:
  """Draws different numbers of so many digits."""
  least = 10 ** (digits - 1)
  found = generator.choice(9 * least, number, replace=False) + least
  return [str(value) for value in found]


def uuids(generator: np.random.Generator, number: int) -> list[str]:
  """Draws uuids of version 4."""
  return [
      str(uuid.UUID(bytes=generator.bytes(16), version=4))
      for _ in range(number)
  ]


def letters(
    generator: np.random.Generator, number: int, length: int, alphabet: str
) -> list[str]:
  """Draws different strings of letters."""
  found: dict[str, None] = {}
  while len(found) < number:
    drawn = generator.choice(list(alphabet), length)
    found["".join(drawn)] = None
  return list(found)


def variables(generator: np.random.Generator, number: int) -> list[str]:
  """Draws different names of five capital letters."""
  return letters(generator, number, 5, string.ascii_uppercase)


def people(generator: np.random.Generator, number: int) -> list[str]:
  """Draws different names of people."""
  return _joined(generator, number, _FIRST, _LAST, " ")


def places(generator: np.random.Generator, number: int) -> list[str]:
  """Draws different names of towns."""
  return _joined(generator, number, _PLACE, _OF_PLACE, "")


def most_people() -> int:
  """How many different people and towns there are, the fewer of both."""
  return min(len(_FIRST) * len(_LAST), len(_PLACE) * len(_OF_PLACE))


def _joined(
    generator: np.random.Generator,
    number: int,
    first: tuple[str, ...],
    second: tuple[str, ...],
    between: str,
) -> list[str]:
  chosen = generator.choice(len(first) * len(second), number, replace=False)
  return [
      first[i // len(second)] + between + second[i % len(second)]
      for i in chosen
  ]


def _pair(index: int) -> str:
  adjective, noun = divmod(index, len(filler.WORDS))
  return f"{_ADJECTIVES[adjective]}-{filler.WORDS[noun]}"
