"""Texts that say nothing, for needles to hide in, and pieces of text as ids.

A text is made of pieces that are encoded one by one, so that it is known which
ids each became: pieces begin with a space or a new line, where tokenizers cut.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

from jaxtyping import Int
import numpy as np

from joma.transformer.text import corpus_text
from joma.transformer.text import tokenizer as tokenizer_lib
from scansnap_jax.experiment import errors

Ids = Int[np.ndarray, "_"]

_SUBJECTS = (
    "The old baker",
    "A quiet neighbour",
    "The ferry captain",
    "Her younger cousin",
    "The night watchman",
    "A retired teacher",
    "The market clerk",
    "His grandmother",
)
_VERBS = (
    "carried",
    "painted",
    "repaired",
    "admired",
    "borrowed",
    "described",
    "polished",
    "forgot",
)
_OBJECTS = (
    "the wooden ladder",
    "a basket of pears",
    "the blue curtain",
    "an empty barrel",
    "the garden gate",
    "a woollen blanket",
    "the copper kettle",
    "a folded map",
)
_PLACES = (
    "near the harbour",
    "behind the mill",
    "after the rain",
    "before breakfast",
    "on the narrow bridge",
    "in the cold kitchen",
    "late in autumn",
    "beside the road",
)
# Nouns, each a word of its own to any tokenizer that knows English.
WORDS = tuple(
    "apple anchor basket beacon bottle branch bridge bucket butter button"
    " candle carpet castle cattle circle coffee copper corner cotton cousin"
    " dinner doctor dragon engine fabric family farmer feather finger flower"
    " forest garden ginger guitar hammer harbor helmet island jacket jungle"
    " kettle ladder leather lemon letter lizard magnet market meadow mirror"
    " monkey mountain needle orange orchard oyster paper parrot pencil pepper"
    " pillow planet pocket potato rabbit ribbon river rocket saddle salmon"
    " school shadow silver spider spoon stable statue summer table temple"
    " thunder ticket tiger tunnel turtle valley velvet village violin wagon"
    " walnut window winter wizard".split()
)


def sentence(generator: np.random.Generator) -> str:
  """Draws a sentence that answers nothing."""
  parts = [generator.choice(p) for p in (_SUBJECTS, _VERBS, _OBJECTS, _PLACES)]
  return " " + " ".join(parts) + "."


@functools.cache
def shakespeare() -> tuple[str, ...]:
  """Lines of the embedded text, as pieces."""
  text = corpus_text.find(corpus_text.EMBEDDED).splits["train"].decode()
  return tuple(" " + line.strip() for line in text.splitlines() if line.strip())


@dataclasses.dataclass(frozen=True)
class Piece:
  """A piece of a text.

  Attributes:
    text: What it says.
    gold: A part of it whose tokens hold an answer; "" is none.
  """

  text: str
  gold: str = ""


class Encoder:
  """Encodes pieces; special tokens that a tokenizer adds come once, in front.

  Attributes:
    front: Those special tokens.
  """

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer):
    self._tokenizer = tokenizer
    added = tokenizer.encode("")
    # What it adds to a letter, in front and behind.
    both = tokenizer.encode("a")
    self.front = added[:1] if len(added) and both[0] == added[0] else added[:0]
    behind = len(added) - len(self.front)
    self._cut = slice(len(self.front), -behind if behind else None)
    self._known: dict[str, Ids] = {}

  def encode(self, text: str) -> Ids:
    """Returns the ids of a piece of text, without special tokens."""
    if text not in self._known:
      self._known[text] = self._tokenizer.encode(text)[self._cut]
    return self._known[text]

  def join(self, pieces: Sequence[Piece]) -> tuple[Ids, Ids]:
    """Returns the ids of a text, special tokens in front, and gold positions.

    Raises:
      UserError: A piece's gold is no part of it.
    """
    ids, gold = [*self.front], []
    for piece in pieces:
      before, found, after = piece.text.partition(piece.gold or piece.text)
      if not found and piece.text:
        raise errors.UserError(f"{piece.gold!r} is no part of {piece.text!r}.")
      # A space belongs to the word behind it.
      trimmed = before.rstrip(" ")
      found = before[len(trimmed) :] + found
      parts = [self.encode(part) for part in (trimmed, found, after)]
      if piece.gold:
        start = len(ids) + len(parts[0])
        gold += range(start, start + len(parts[1]))
      for part in parts:
        ids += part.tolist()
    return np.array(ids, np.int32), np.array(gold, np.int32)

  def count(self, piece: Piece) -> int:
    """Tokens of a piece."""
    return len(self.join([piece])[0]) - len(self.front)


def surround(
    encoder: Encoder,
    generator: np.random.Generator,
    before: Sequence[Piece],
    needles: Sequence[Piece],
    after: Sequence[Piece],
    *,
    length: int,
    kind: str = "sentences",
    depths: Sequence[float] | None = None,
) -> list[Piece]:
  """Puts needles between filler, as much as `length` tokens have room for.

  Args:
    encoder: Of the pieces.
    generator: Of filler and places.
    before: What comes first.
    needles: In their order.
    after: What comes last: the question.
    length: Tokens of the whole text at most, special tokens included.
    kind: `sentences`, or `shakespeare`: lines from a random place on.
    depths: Where each needle goes, from 0 to 1, ascending; None is anywhere.

  Returns:
    All pieces.

  Raises:
    UserError: Not even the needles fit.
  """
  fixed = [*before, *needles, *after]
  room = length - len(encoder.front) - sum(map(encoder.count, fixed))
  if room < 0:
    raise errors.UserError(
        f"length={length} is too short: what must be said takes"
        f" {length - room} tokens."
    )
  filler = _fill(encoder, _drawer(generator, kind), room)
  if depths is None:
    depths = np.sort(generator.random(len(needles))).tolist()
  text, start = [*before], 0
  for depth, needle in zip(depths, needles, strict=True):
    # Depths are of the filler: what is asked does not move what is around it.
    stop = round(depth * len(filler))
    text += [*filler[start:stop], needle]
    start = max(start, stop)
  return [*text, *filler[start:], *after]


def _fill(encoder: Encoder, draw: Callable[[], str], room: int) -> list[Piece]:
  """Pieces as they are drawn, up to the first for which there is no room."""
  found = []
  while True:
    piece = Piece(draw())
    room -= encoder.count(piece)
    if room < 0:
      return found
    found.append(piece)


def _drawer(generator: np.random.Generator, kind: str) -> Callable[[], str]:
  if kind == "sentences":
    return lambda: sentence(generator)
  if kind != "shakespeare":
    raise errors.UserError(
        f"filler={kind} is neither sentences nor shakespeare."
    )
  lines = shakespeare()
  place = int(generator.integers(len(lines)))

  def draw() -> str:
    nonlocal place
    place = (place + 1) % len(lines)
    return lines[place]

  return draw
