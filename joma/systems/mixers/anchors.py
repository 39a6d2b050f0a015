"""Where a query's anchors stand, and the spans of keys round them.

Query t has anchors at t - i^2 + 1 for i > s, 2 i + 1 apart at i, and before
them a window of the newest (s + 1)^2 - 1 keys.

Letters: A anchors, W anchors that are kept.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import masks


@dataclasses.dataclass(frozen=True)
class Anchors:
  """See the module.

  Attributes:
    k: Anchors that are kept.
    s: Squares that the window holds in the place of anchors.
    behind: Reach of a span before its anchor, over sqrt(t + 1).
    ahead: Reach after it.
  """

  k: int
  s: int
  behind: float
  ahead: float

  @property
  def window(self) -> int:
    """Keys that are read whatever the search finds."""
    return (self.s + 1) ** 2 - 1

  def num(self, length: int) -> int:
    """Anchors of the last of `length` tokens."""
    return max(math.isqrt(length) - self.s, 0)

  def places(
      self, position: Int[Array, "*b"], num_anchors: int
  ) -> Int[Array, "*b A"]:
    """Where the anchors of tokens stand; below 0 is none."""
    number = self.s + 1 + jnp.arange(num_anchors)
    return position[..., None] - masks.to_rank(number**2 - 1, position.ndim + 1)

  def span(
      self, position: Int[Array, "*b"], anchor: Int[Array, "*b"], length: int
  ) -> tuple[Int[Array, "*b"], Int[Array, "*b"]]:
    """First key of a span and one past its last, clear of the window.

    Args:
      position: Of the queries.
      anchor: One of each query's; below 0 is none, and its span is empty.
      length: Keys that there are, static.
    """
    root = jnp.sqrt((position + 1).astype(jnp.float32))
    reach = lambda factor: jnp.ceil(jnp.minimum(factor * root, length)).astype(
        jnp.int32
    )
    start = jnp.maximum(anchor - reach(self.behind), 0)
    stop = jnp.minimum(
        anchor + reach(self.ahead) + 1, position + 1 - self.window
    )
    return start, jnp.where(anchor < 0, start, jnp.maximum(stop, start))


def best(
    scores: Float[Array, "*b A"], places: Int[Array, "*b A"], width: int
) -> tuple[Float[Array, "*b W"], Int[Array, "*b W"]]:
  """Scores and places of the best anchors, -1 where there are fewer.

  Args:
    scores: Of all anchors of each query.
    places: Where they stand; below 0 is none.
    width: W, at most A.
  """
  scores = jnp.where(places >= 0, scores, -jnp.inf)
  scores, index = jax.lax.top_k(scores, width)
  places = jnp.take_along_axis(places, index, axis=-1)
  return scores, jnp.where(scores > -jnp.inf, places, -1)


def gates(
    scores: Float[Array, "*b W"], is_valid: Bool[Array, "*b W"]
) -> Float[Array, "*b W"]:
  """Softmax over the valid ones; 0 where none is."""
  has_any = is_valid.any(axis=-1, keepdims=True)
  scores = jnp.where(is_valid | ~has_any, scores, -jnp.inf)
  return jnp.where(is_valid, jax.nn.softmax(scores), 0.0)
