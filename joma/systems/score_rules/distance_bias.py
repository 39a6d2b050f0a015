"""Attention that knows distances: Transformer-XL's terms, with learned tables.

  logits_ts = scale (q_t + u) (k_s + r_{t-s}) + b_{t-s}

u [N, H], r [W, N, H] and b [W, N] are learned; distances of W and more share
the last row (https://arxiv.org/abs/1901.02860, whose r is a projection of
sinusoids; its v r is part of b here). With zeros it is plain attention. The
bias depends on query and distance: weights are computed some queries at a time.
XLA only.

Letters: B batch, T queries, S keys, W distances, N query heads, K key and value
heads, H head size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.transformer import config as configs
from joma.transformer import hooks
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class DistanceBias:
  """A score rule.

  Attributes:
    reach: W, distances with rows of their own.
    start: Standard deviation of u, r and b before training.
  """

  name: ClassVar[str] = "distance_bias"
  paper: ClassVar[str] = "https://arxiv.org/abs/1901.02860"
  neutral: ClassVar[str] = "distance_bias:start=0"
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
      "query": ("tensor", None),
      "keys": (None, "tensor", None),
      "bias": (None, "tensor"),
  }

  reach: int = 128
  start: float = 0.02

  def __post_init__(self):
    require.at_least("distance_bias: reach", self.reach, 1)

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns `query`, u; `keys`, r; and `bias`, b."""
    heads, size = config.num_heads, config.head_dim
    shapes = {
        "query": (heads, size),
        "keys": (self.reach, heads, size),
        "bias": (self.reach, heads),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: self.start * jax.random.normal(one, shape)
        for one, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

  def init_state(
      self, config: configs.TransformerConfig, layer: int, batch_size: int
  ) -> None:
    """None: a token needs nothing of others."""

  def prepare(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "#B T N H"],
      key: Float[Array, "#B T K H"],
      value: Float[Array, "B T K H"],
      state: PyTree,
  ) -> tuple[Array, Array, Array, PyTree]:
    """Adds u to the queries."""
    return query + params["query"].astype(query.dtype)[None, None], *(
        key,
        value,
        state,
    )

  def weights(self, params: hooks.Params, call: hooks.Call) -> hooks.WeightRule:
    """Softmax of logits with the two terms of distance."""
    scale = call.options.scale

    def bias(
        query: Float[Array, "B T N H"],
        places: Int[Array, "B T"],
        key_places: Int[Array, "#B S"],
    ) -> Float[Array, "B N T S"]:
      rows = jnp.einsum(
          "BTNH,WNH->BNTW", query.astype(jnp.float32), params["keys"]
      )
      rows = scale * rows + params["bias"].T[None, :, None]
      distance = places[:, :, None] - key_places[:, None]
      distance = jnp.clip(distance, 0, self.reach - 1)[:, None]
      return jnp.take_along_axis(rows, distance, axis=-1)

    return hooks.WeightRule(name=self.name, bias=bias)
