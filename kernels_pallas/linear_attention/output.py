"""What linear attention returns."""

from typing import NamedTuple

from jaxtyping import Array, Float


class LinearAttentionOutput(NamedTuple):
  """Result of linear attention.

  Attributes:
    out: Float [B, T, N, H], in the query's dtype.
    state: Float32 (float64 for float64) [B, N, H, H], key by value channels,
      after the last position; None if not asked.
  """

  out: Float[Array, "B T N H"]
  state: Float[Array, "B N H H"] | None = None
