"""What a selector of blocks does when one query a sequence decodes.

Letters: B batch, T new tokens, N query heads, K key and value heads, G = N / K,
S positions, W blocks that are read, H head size.
"""

from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, PyTree

from joma.transformer import config as configs
from joma.transformer import hooks
from kernels_pallas import masks


@runtime_checkable
class Selecting(Protocol):
  """A selector of blocks."""

  name: ClassVar[str]

  @property
  def block(self) -> int:
    """Keys of a block."""
    ...

  def select(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B S K H"],
      mask: masks.Mask,
  ) -> hooks.Where:
    """As `hooks.Select`, of whole prompts."""
    ...

  def choose_by(
      self,
      query: Float[Array, "B K G H"],
      kept: PyTree,
      position: Int[Array, "B"],
      call: hooks.Call,
  ) -> tuple[Int[Array, "B K W"], Bool[Array, "B K W"]] | None:
    """Chooses for one query a sequence.

    Args:
      query: Rotated, by key head.
      kept: What a `Summarizing` system keeps; all keys [B, K, S, H] for others.
      position: Of the query.
      call: Of the layer.

    Returns:
      Different blocks up to the position's own, and which count; None reads
      everything.
    """
    ...


@runtime_checkable
class Summarizing(Selecting, Protocol):
  """One that keeps something of the keys to choose by."""

  def init_summary(
      self, config: configs.TransformerConfig, batch_size: int, num_blocks: int
  ) -> PyTree:
    """Returns what is kept of an empty cache, leaves [B, ...]."""
    ...

  def summarize(
      self,
      summary: PyTree,
      call: hooks.Call,
      key: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
  ) -> PyTree:
    """Adds new tokens; keys are rotated, and those at -1 are padding."""
    ...
