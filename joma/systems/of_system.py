"""What caches of one system have in common: whom they follow, what they take.

A cache is a dataclass below them, with fields for what it keeps.

Letters: B batch, T new tokens, N query heads, K key and value heads, H head
size.
"""

import dataclasses
from typing import ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from jaxtyping import Array, Float, Int

from joma.transformer import hooks
from joma.transformer import one_by_one


@runtime_checkable
class Named(Protocol):
  """A system, by its name in `joma.systems.names`."""

  name: ClassVar[str]


System = TypeVar("System", bound=Named)


@dataclasses.dataclass(frozen=True)
class OfSystem(Generic[System]):
  """A cache that follows its system alone.

  Attributes:
    system: Static.
  """

  system: System = dataclasses.field(metadata={"static": True})

  @property
  def honours(self) -> tuple[str, ...]:
    """Its system."""
    return (self.system.name,)


@dataclasses.dataclass(frozen=True)
class InPieces(OfSystem[System]):
  """One whose state is all that there is of a text so far."""

  def takes_pieces(self) -> bool:
    """Always: what comes next goes on from the state."""
    return True


@dataclasses.dataclass(frozen=True)
class PromptFirst(OfSystem[System]):
  """One that reads a first prompt at once, and what follows one by one."""

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "PromptFirst[System]"]:
    """A first prompt as a whole text; what follows one by one."""
    arguments = (query, key, value, positions, rotate, options)
    cls = type(self)
    return one_by_one.but_first(cls.take, cls.attend, self, *arguments)

  def take(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "PromptFirst[System]"]:
    """Takes a first prompt, padded at its end, or one token a sequence."""
    raise NotImplementedError
