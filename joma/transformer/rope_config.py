"""Settings of rotary positions; the frequencies themselves are in `rope`."""

import dataclasses
from typing import Literal

RopeType = Literal["default", "linear", "ntk", "dynamic", "yarn", "longrope", "llama3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Which rotary frequencies, in the words of Hugging Face's dictionaries.

  Attributes:
    rope_type: Kind of scaling.
    rope_theta: Base b of the frequencies b ** (-2 j / d).
    factor: s, by how much the context is stretched.
    original_max_len: Positions before stretching, L.
  """

  rope_type: RopeType = "default"
  rope_theta: float = 10_000.0
  factor: float = 1.0
  original_max_len: int | None = None
