"""What the gated delta rule returns."""

from typing import NamedTuple

from jaxtyping import Array, Float


class GatedDeltaRuleOutput(NamedTuple):
  """Result of the gated delta rule.

  Attributes:
    out: Float [B, T, N, J], in the query's dtype.
    state: Float32 (float64 for float64) [B, N, H, J], key by value channels,
      after the last position.
  """

  out: Float[Array, "B T N J"]
  state: Float[Array, "B N H J"]
