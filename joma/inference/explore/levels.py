"""Attention weights as one byte each, on a scale of logarithms.

  a = 2^((level - 255) / 20), level 1 to 255; level 0 is less than half of that

Neighbouring levels are 3.5 % apart, so that a weight is at most 1.75 % off; the
lowest is 1.5e-4. Attention spans many magnitudes, which a scale of equal steps
would show as one grey.
"""

from jaxtyping import Float, UInt8
import numpy as np

STEPS_PER_OCTAVE = 20
# Relative; of a weight at or above `LEAST`.
ERROR = 2 ** (0.5 / STEPS_PER_OCTAVE) - 1
# Weights below this are level 0.
LEAST = 2 ** ((0.5 - 255) / STEPS_PER_OCTAVE)


def encode(weights: Float[np.ndarray, "*b"]) -> UInt8[np.ndarray, "*b"]:
  """Returns the nearest levels of weights in [0, 1]."""
  with np.errstate(divide="ignore"):
    found = 255 + STEPS_PER_OCTAVE * np.log2(weights)
  return np.clip(np.rint(found), 0, 255).astype(np.uint8)


def decode(levels: UInt8[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
  """Returns the weights that levels stand for; 0 of level 0."""
  weights = np.exp2((levels.astype(np.float64) - 255) / STEPS_PER_OCTAVE)
  return np.where(levels == 0, 0.0, weights)
