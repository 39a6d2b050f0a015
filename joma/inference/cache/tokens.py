"""New tokens of each sequence, as the layers hand them to a cache.

Letters: B batch, T new tokens, D width, N query heads, K key and value heads,
G = N / K, H head size.
"""

import dataclasses
from typing import Any

from jaxtyping import Array, Float, Int

from joma.inference.cache import policy as policy_lib
from joma.transformer import hooks


@dataclasses.dataclass(frozen=True)
class Tokens:
  """The arguments of `hooks.KVCache.attend`.

  Attributes:
    query: Not rotated yet.
    key: Not rotated yet.
    value: Of the same tokens.
    positions: In the sequence; -1 is padding, which is not kept.
    rotate: Applies the model's rotary positions.
    options: Of attention.
  """

  query: Float[Array, "B T N H"]
  key: Float[Array, "B T K H"]
  value: Float[Array, "B T K H"]
  positions: Int[Array, "B T"]
  rotate: hooks.Rotate
  options: hooks.AttentionOptions

  @property
  def arguments(self) -> tuple[Any, ...]:
    """As `attend` takes them."""
    return (
        self.query,
        self.key,
        self.value,
        self.positions,
        self.rotate,
        self.options,
    )

  @property
  def x(self) -> Float[Array, "B T D"] | None:
    """The layer's input; None where the layer says nothing of the call."""
    return None if self.options.call is None else self.options.call.x

  @property
  def rotated_query(self) -> Float[Array, "B T N H"]:
    """Queries as they meet keys."""
    return self.rotate(self.query, self.positions)

  @property
  def rotated_key(self) -> Float[Array, "B T K H"]:
    """Keys as they meet queries."""
    return self.rotate(self.key, self.positions)

  def one(self, layer: int, is_raw: bool = False) -> policy_lib.Token:
    """Returns the only token, T = 1, as a policy sees it.

    Args:
      layer: Of the model.
      is_raw: Whether keys are kept before rotation.
    """
    num_kv_heads = self.key.shape[2]
    key = self.key if is_raw else self.rotated_key
    return policy_lib.Token(
        key=key[:, 0],
        value=self.value[:, 0],
        raw_key=self.key[:, 0],
        raw_query=self.query.reshape(
            len(self.query), num_kv_heads, -1, self.query.shape[-1]
        ),
        position=self.positions[:, 0],
        rotate=self.rotate,
        scale=self.options.scale,
        layer=layer,
        out_kernel=self.options.out_kernel,
        x=None if self.x is None else self.x[:, 0],
    )
