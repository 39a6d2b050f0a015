"""Questions about passages, one of which holds the answer, or two in turn.

RULER (arXiv 2404.06654), section 3.4, takes passages of SQuAD and HotpotQA.
Differs from the paper: passages are made here, about people and towns that do
not exist, so that nothing is downloaded and nothing is known beforehand.
"""

import numpy as np

from joma.inference.evaluation.ruler import sample as sample_lib
from joma.inference.evaluation.ruler import vocabulary

_TRADES = (
    "baker",
    "carpenter",
    "clockmaker",
    "engineer",
    "gardener",
    "geologist",
    "librarian",
    "painter",
    "pilot",
    "surgeon",
    "teacher",
    "weaver",
)
_RIVERS = (
    "Ald",
    "Brenna",
    "Corva",
    "Dell",
    "Esker",
    "Fenn",
    "Garrow",
    "Hollin",
    "Isen",
    "Lorne",
)
_TASK = (
    "Answer the question based on the given documents. Only give me the answer"
    " and do not output any other words."
)


def one_hop(generator: np.random.Generator, size: int) -> sample_lib.Sample:
  """Draws passages about people; a fact of one of them is asked.

  Args:
    generator: Of all draws.
    size: Passages besides that one.
  """
  people = vocabulary.people(generator, size + 1)
  towns = _towns(generator, size + 1)
  trades = [str(generator.choice(_TRADES)) for _ in people]
  texts = [
      _person(generator, person, town, trade)
      for person, town, trade in zip(people, towns, trades, strict=True)
  ]
  asks_town = bool(generator.integers(2))
  question = (
      f"In which town was {people[0]} born?"
      if asks_town
      else f"What was the trade of {people[0]}?"
  )
  answer = towns[0] if asks_town else trades[0]
  return _ask(generator, texts, question, answer)


def two_hops(generator: np.random.Generator, size: int) -> sample_lib.Sample:
  """Draws passages about people and towns; a person's town's river is asked.

  Args:
    generator: Of all draws.
    size: Passages besides those two.
  """
  others = size // 2
  num_people, num_towns = size - others + 1, others + 1
  people = vocabulary.people(generator, num_people)
  towns = _towns(generator, max(num_people, num_towns))
  rivers = [str(generator.choice(_RIVERS)) for _ in range(num_towns)]
  trade = lambda: str(generator.choice(_TRADES))
  texts = [
      _person(generator, person, town, trade())
      for person, town in zip(people, towns, strict=False)
  ]
  texts += [
      _town(generator, town, river)
      for town, river in zip(towns, rivers, strict=False)
  ]
  question = (
      f"Which river flows through the town in which {people[0]} was born?"
  )
  return _ask(generator, texts, question, rivers[0])


def most() -> int:
  """Passages that there can be."""
  return vocabulary.most_people() - 2


def _towns(generator: np.random.Generator, number: int) -> list[str]:
  return vocabulary.places(generator, number)


def _person(
    generator: np.random.Generator, person: str, town: str, trade: str
) -> str:
  year = int(generator.integers(1820, 1960))
  later = int(generator.integers(20, 40))
  return (
      f"{person}\n{person} was born in {town} in {year}. After years as an"
      f" apprentice {person} became a {trade} and opened a workshop in"
      f" {year + later}."
  )


def _town(generator: np.random.Generator, town: str, river: str) -> str:
  people = 100 * int(generator.integers(5, 400))
  return (
      f"{town}\n{town} is a town of {people} people on both banks of the river"
      f" {river}. A market is held there every week."
  )


def _ask(
    generator: np.random.Generator,
    texts: list[str],
    question: str,
    answer: str,
) -> sample_lib.Sample:
  order = generator.permutation(len(texts))
  documents = "\n\n".join(
      f"Document {place}:\n{texts[i]}" for place, i in enumerate(order, start=1)
  )
  return sample_lib.Sample(
      context=f"{_TASK}\n\nThe following are given documents.\n\n{documents}",
      question=f"\n\n{_TASK}\n\nQuestion: {question}",
      prefix=" Answer:",
      answers=(answer,),
      any_counts=True,
  )
