"""Differential attention: what two softmaxes have in common is noise.

  out_n    = (1 - lambda_0) norm((A_n - lambda A_{n + N/2}) [v_g, v_{g + K/2}])
  lambda   = exp(a_1 b_1) - exp(a_2 b_2) + lambda_0,   n = 0 ... N/2 - 1
  lambda_0 = 0.8 - 0.6 exp(-0.3 layer)

with A_n the weights of head n on its key head g, and vectors a and b of a layer
(https://arxiv.org/abs/2410.05258). A pair of heads is one whose values are
twice as large as its keys; the op takes such values. With lambda = 0 the first
head of each pair is plain attention. Pairs are of the first and the second half
of the heads, as in DiffLlama.

Paper's settings: lambda_0 by layer, as above.

Letters: B batch, T tokens, N query heads, K key and value heads, H head size.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.systems.score_rules import differential_cache
from joma.transformer import attention
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import sharding
from kernels_pallas import masks
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class Differential:
  """A mixer: attention by pairs of heads.

  Attributes:
    epsilon: Of the norm, beside the mean square.
    start: Standard deviation of the vectors of lambda before training.
  """

  name: ClassVar[str] = "differential"
  paper: ClassVar[str] = "https://arxiv.org/abs/2410.05258"
  neutral: ClassVar[str] = ""
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {"vectors": ()}

  epsilon: float = 1e-5
  start: float = 0.1

  def __post_init__(self):
    require.positive("differential: epsilon", self.epsilon)
    require.not_negative("differential: start", self.start)

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns `vectors`, a_1, b_1, a_2, b_2: float32 [4, H].

    Raises:
      UserError: If key heads have no partners.
    """
    if config.num_kv_heads % 2:
      raise errors.UserError(
          "differential takes key and value heads in pairs:"
          f" num_kv_heads={config.num_kv_heads} must be even."
      )
    shape = (4, config.head_dim)
    return {"vectors": self.start * jax.random.normal(key, shape)}

  def mix(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      mask: masks.Mask,
  ) -> Float[Array, "B T N H"]:
    """Returns the heads' outputs of whole texts."""
    where = attention.with_window(mask, query.shape[1], call.options.window)
    query = call.rotate(query, call.positions)
    key = call.rotate(key, call.positions)
    attend = lambda query, key, value, where: differential_cache.read_pairs(
        query, key, value, where, call.options
    )
    pairs = differential_cache.of_pairs(value)
    read = sharding.per_part(attend, query, key, pairs, where)
    return self.finish(params, call.layer, read)

  def finish(
      self, params: hooks.Params, layer: int, read: Float[Array, "B T N _"]
  ) -> Float[Array, "B T N H"]:
    """Takes each second head from its first, and norms what is left.

    Args:
      params: Of the layer.
      layer: Which, from 0.
      read: What each head reads of its pair's values, [B, T, N, 2 H].
    """
    a_1, b_1, a_2, b_2 = params["vectors"]
    first = 0.8 - 0.6 * math.exp(-0.3 * layer)
    share = jnp.exp((a_1 * b_1).sum()) - jnp.exp((a_2 * b_2).sum()) + first
    one, two = jnp.split(read.astype(jnp.float32), 2, axis=2)
    apart = one - share * two
    size = jnp.square(apart).mean(axis=-1, keepdims=True)
    apart = (1 - first) * apart * jax.lax.rsqrt(size + self.epsilon)
    shape = (*read.shape[:3], read.shape[3] // 2)
    return apart.reshape(shape).astype(read.dtype)

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> hooks.KVCache:
    """Returns an empty cache, which keeps everything."""
    return differential_cache.init(
        self, config, layer, batch_size, capacity, dtype
    )
