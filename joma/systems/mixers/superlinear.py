"""Superlinear attention: a search among sqrt(t) anchors, and spans behind them.

Query t scores the keys at t - i^2 + 1 for i > s by a search query of its own,
keeps the k best, and attends from its attention query to a window of the newest
(s + 1)^2 - 1 keys and, k times, to a span round one of these anchors a:

  span = [a - ceil(behind sqrt(t + 1)), a + ceil(ahead sqrt(t + 1))]
  out  = sum_j gate_j attention(window and span j),  gate = softmax(scores)

Anchors are 2 i + 1 apart at i, so that with behind >= 2 every key is in reach
of some anchor. The gate gives the search its gradient. Text of T tokens costs
O(T^1.5); a step reads O(sqrt(T)) keys. After PyPI's `superlinear` 0.1.0.

Letters: B batch, T tokens, D width, N query heads, K key and value heads, H
head size.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.systems.mixers import anchors as anchors_lib
from joma.systems.mixers import superlinear_cache
from joma.systems.mixers import superlinear_text
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import layer_hooks
from joma.transformer import sharding
from kernels_pallas import masks
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class Superlinear:
  """A mixer.

  Attributes:
    k: Anchors that are kept.
    s: Squares that the window holds in the place of anchors.
    behind: Reach of a span before its anchor, over sqrt(t + 1).
    ahead: Reach after it.
  """

  name: ClassVar[str] = "superlinear"
  paper: ClassVar[str] = "https://pypi.org/project/superlinear/0.1.0"
  neutral: ClassVar[str] = "superlinear:k=1:s=0:behind=1e6:ahead=1e6"
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
      "search": ("fsdp", "tensor", None)
  }

  k: int = 3
  s: int = 15
  behind: float = 2.0
  ahead: float = 0.0

  def __post_init__(self):
    require.at_least("superlinear: k", self.k, 1)
    require.at_least("superlinear: s", self.s, 0)
    require.positive("superlinear: behind", self.behind)

  @property
  def anchors(self) -> anchors_lib.Anchors:
    """Where anchors and spans stand."""
    return anchors_lib.Anchors(self.k, self.s, self.behind, self.ahead)

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns `search` [D, K, H], the projection of search queries."""
    shape = (config.embed_dim, config.num_kv_heads, config.head_dim)
    return {"search": shape[0] ** -0.5 * jax.random.normal(key, shape)}

  def search(
      self, params: hooks.Params, call: hooks.Call
  ) -> Float[Array, "B T K H"]:
    """Search queries, rotated."""
    kernel = params["search"].astype(call.x.dtype)
    found = jnp.einsum("BTD,DKH->BTKH", call.x, kernel)
    return call.rotate(found, call.positions)

  def mix(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      mask: masks.Mask,
  ) -> Float[Array, "B T N H"]:
    """Returns the heads' outputs of whole texts; refuses other masks."""
    layer_hooks.check_causal(self.name, call, mask)
    query = call.rotate(query, call.positions)
    key = call.rotate(key, call.positions)
    return self.attend(query, key, value, self.search(params, call), call)

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      search: Float[Array, "B T K H"],
      call: hooks.Call,
  ) -> Float[Array, "B T N H"]:
    """As `mix`, of rotated arrays."""
    batch, length, num_kv_heads, head_dim = key.shape
    grouped = query.reshape(batch, length, num_kv_heads, -1, head_dim)
    # The search goes with its key head, where a mesh splits those.
    both = jnp.concatenate([grouped, search[:, :, :, None]], axis=3)
    both = both.reshape(batch, length, -1, head_dim)
    attend = functools.partial(
        superlinear_text.attend, self.anchors, options=call.options
    )
    return sharding.per_part(attend, both, key, value, masks.causal(length))

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> hooks.KVCache:
    """Returns an empty cache, which keeps everything."""
    return superlinear_cache.init(
        self, config, layer, batch_size, capacity, dtype
    )
