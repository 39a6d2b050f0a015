"""What `kivi` and `four_bits` share: sizes of groups, and keys beside values.

Keys have a scale and an offset for each channel of g tokens, values for each
token's g channels, or all where these do not divide the head.

Letters: n tokens, g numbers of a group, H head size.
"""

from typing import Any

import jax
from jaxtyping import Array, Float

from joma.inference.cost import cache_plan
from joma.systems.cache_policies.own_cache import int4
from joma.transformer import config as configs
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

# Of keys, and of values.
Pair = tuple[int4.Codes, int4.Codes]


def check_sizes(num_exact: int, group_size: int) -> None:
  """Raises UserError unless exact tokens are whole groups."""
  require.at_least("num_exact", num_exact, 1)
  require.at_least("group_size", group_size, 1)
  if num_exact % group_size:
    raise errors.UserError(
        f"num_exact={num_exact} must be a multiple of group_size={group_size}."
    )


def check_heads(name: str, config: configs.TransformerConfig) -> None:
  """Raises UserError where the codes of a head fill no whole bytes."""
  if config.head_dim % 2:
    raise errors.UserError(
        f"head_dim={config.head_dim} must be even for {name}: two codes share a"
        " byte."
    )


def empty(
    shape: tuple[int, ...], group_size: int, dtype: jax.typing.DTypeLike
) -> Pair:
  """Returns codes of zeros for vectors of such a shape [..., n, H]."""
  of_value = cache_plan.value_group(shape[-1], group_size)
  keys = int4.empty(shape, "tokens", group_size, dtype)
  return keys, int4.empty(shape, "channels", of_value, dtype)


def encode(
    key: Float[Array, "... n H"],
    value: Float[Array, "... n H"],
    group_size: int,
    dtype: jax.typing.DTypeLike,
) -> Pair:
  """Returns the codes of both, with scales of a type."""
  of_value = cache_plan.value_group(value.shape[-1], group_size)
  keys = int4.encode(key, "tokens", group_size, dtype)
  return keys, int4.encode(value, "channels", of_value, dtype)


def decode(
    key: int4.Codes, value: int4.Codes, group_size: int
) -> tuple[Float[Array, "... n H"], Float[Array, "... n H"]]:
  """Returns the keys and values, float32."""
  head_dim: Any = 2 * value.data.shape[-1]
  of_value = cache_plan.value_group(head_dim, group_size)
  keys = int4.decode(key, "tokens", group_size)
  return keys, int4.decode(value, "channels", of_value)
