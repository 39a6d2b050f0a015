"""What the matrices of a layer are: `dense`, or `monarch:blocks=4:rank=8`.

`TransformerConfig.projection` names it. A Monarch matrix [D, E]
(https://arxiv.org/abs/2204.00595) is cut into b x b slices of D / b inputs and
E / b outputs, each of a rank r of its own: r b (D + E) numbers. With one block
it is a matrix of rank r; with sqrt(D) blocks and rank 1 a square one is the
paper's. Imports no jax.
"""

import dataclasses
import re
from typing import Literal, get_args

from scansnap_jax.experiment import require
from scansnap_jax.experiment.errors import UserError

DENSE, MONARCH = "dense", "monarch"
Part = Literal["all", "attn", "mlp"]
_PARTS = get_args(Part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Monarch:
  """Sizes of Monarch matrices.

  Attributes:
    blocks: b, of inputs and of outputs; divides both.
    rank: r, of each slice.
    part: Matrices that are Monarch: those of attention, of MLPs, or all.
  """

  blocks: int = 4
  rank: int = 8
  part: Part = "all"

  def is_of(self, part: str) -> bool:
    """Whether the matrices of `attn`, or of `mlp`, are Monarch."""
    return self.part in ("all", part)

  def num_params(self, num_in: int, num_out: int) -> int:
    """Numbers of a matrix [D, E], biases aside."""
    return self.blocks * self.rank * (num_in + num_out)

  def check(self, name: str, num_in: int, num_out: int) -> None:
    """Raises UserError unless a matrix [D, E] can be cut so."""
    for side, size in (("inputs", num_in), ("outputs", num_out)):
      if size % self.blocks:
        raise UserError(
            f"projection=monarch with blocks={self.blocks} must divide the"
            f" {size} {side} of {name}."
        )
    most = min(num_in, num_out) // self.blocks
    if self.rank > most:
      raise UserError(
          f"projection=monarch with rank={self.rank} is more than a slice of"
          f" {name} has: {num_in} x {num_out} in {self.blocks} blocks allow"
          f" {most}."
      )

  def __str__(self) -> str:
    part = "" if self.part == "all" else f":part={self.part}"
    return f"{MONARCH}:blocks={self.blocks}:rank={self.rank}{part}"


def parse(text: str) -> Monarch | None:
  """Returns the sizes that a `TransformerConfig.projection` names.

  Args:
    text: dense, or monarch with options behind, as monarch:blocks=16:rank=1.

  Returns:
    None for dense.

  Raises:
    UserError: The name or an option is unknown, or a value cannot be.
  """
  name, *settings = text.split(":")
  if name not in (DENSE, MONARCH) or (name == DENSE and settings):
    raise UserError(
        f"projection={text!r} must be dense, or monarch with options as in"
        " monarch:blocks=4:rank=8:part=mlp."
    )
  if name == DENSE:
    return None
  fields: dict[str, int | str] = {}
  for setting in settings:
    option, _, value = setting.partition("=")
    fields[option] = _value(text, option, value)
  return Monarch(**fields)  # type: ignore[bad-argument-type]


def _value(text: str, option: str, value: str) -> int | str:
  if option == "part" and value in _PARTS:
    return value
  if option in ("blocks", "rank") and re.fullmatch(r"\d{1,9}", value):
    require.at_least(option, int(value), 1)
    return int(value)
  raise UserError(
      f"projection={text!r}: {option}={value} is no option; there are"
      f" blocks=NUMBER, rank=NUMBER and part={'|'.join(_PARTS)}."
  )
