"""Flux: each layer reads everything or little, as the prompt's queries say.

  z        = 1 where the router of the pooled queries says full, else 0
  out      = z attention + (1 - z) attention to the first and newest keys
  p        = softmax of the router's two outputs, z of the greater
  loss     = lambda_1 |s - s*| + lambda_2 (s - s*)^2,   s = mean of 1 - z over
             layers and texts

(https://arxiv.org/abs/2604.07394). Queries are pooled over the first and the
last tokens of the text and over heads, so that what the router costs does not
depend on the length; its last weights begin at 0 and its biases at (0, 4.5): p
of full is .989. Forward z is 0 or 1, backward its gradient is that of p. The
multipliers are parameters of the last layer, and rise where the others fall:
the gradient by them is turned round. Ours draws no noise.

The route is one of the whole text: a language model is not trained with it. A
prompt chooses for what follows it.

Paper's settings: features by layers of 1,024 and 256 units, the router's of 512
and 128; .989 full at the start.

Letters: B batch, T tokens, N query heads, K key and value heads, H head size, R
hidden units, L layers.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.systems.routers import flux_cache
from joma.systems.routers import flux_router
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import layer_hooks
from joma.transformer import sharding
from joma.transformer.weighing import merged
from kernels_pallas import masks
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class Flux:
  """A mixer: attention to everything, or to a stream.

  Attributes:
    sinks: First keys of the stream.
    window: Its newest keys, a query's own included.
    pool: Tokens at either end whose queries the router reads.
    hidden: R.
    target: s*, share of layers that shall be sparse.
    cost: Both multipliers before training.
    start: Standard deviation of the router's last weights before training.
    force: full or sparse, for all; empty leaves it to the router.
  """

  name: ClassVar[str] = "flux"
  paper: ClassVar[str] = "https://arxiv.org/abs/2604.07394"
  neutral: ClassVar[str] = "flux:force=full"
  sees_later: ClassVar[str] = "queries of the whole text choose the route"
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
      name: () for name in ("in", "hidden", "out", "bias", "multipliers")
  }

  sinks: int = 128
  window: int = 2048
  pool: int = 100
  hidden: int = 256
  target: float = 0.5
  cost: float = 1.0
  start: float = 0.0
  force: str = ""

  def __post_init__(self):
    require.at_least("flux: sinks", self.sinks, 0)
    for name in ("window", "pool", "hidden"):
      require.at_least(f"flux: {name}", getattr(self, name), 1)
    if not 0 <= self.target <= 1:
      raise errors.UserError(
          f"flux: target={self.target} must lie in [0, 1]: a share of layers."
      )
    require.not_negative("flux: cost", self.cost)
    require.not_negative("flux: start", self.start)
    if self.force:
      require.one_of("flux: force", self.force, ("full", "sparse"))

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns the router's weights; the last layer's multipliers [2]."""
    if self.force:
      return {}
    found = flux_router.draw(key, config.head_dim, self.hidden, self.start)
    if layer == config.num_layers - 1:
      found["multipliers"] = jnp.full((2,), self.cost, jnp.float32)
    return found

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
    share = self.full_share(params, query, call.positions)
    query = call.rotate(query, call.positions)
    key = call.rotate(key, call.positions)
    return self.by_route(share, query, key, value, call.options)

  def by_route(
      self,
      share: Float[Array, "B"],
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      options: hooks.AttentionOptions,
  ) -> Float[Array, "B T N H"]:
    """Attends causally both ways and mixes; arrays are rotated."""
    length = query.shape[1]
    attend = lambda query, key, value, where: merged.attend(
        query, key, value, where, options
    ).out
    both = {
        "full": masks.causal(length),
        "sparse": masks.streaming(
            length, window=self.window, num_sinks=self.sinks
        ),
    }
    if self.force:
      return sharding.per_part(attend, query, key, value, both[self.force])
    full, sparse = (
        sharding.per_part(attend, query, key, value, where)
        for where in both.values()
    )
    share = share[:, None, None, None].astype(full.dtype)
    return share * full + (1 - share) * sparse

  def full_share(
      self,
      params: hooks.Params,
      query: Float[Array, "B T N H"],
      positions: Int[Array, "B T"],
  ) -> Float[Array, "B"]:
    """Returns z of each text: 0 or 1, with the gradient of p.

    Args:
      params: Of the layer.
      query: Before rotation.
      positions: -1 is padding.
    """
    if self.force:
      return jnp.full((len(query),), float(self.force == "full"))
    probs = self.full_prob(params, query, positions)
    hard = (probs > 0.5).astype(probs.dtype)
    return hard + probs - jax.lax.stop_gradient(probs)

  def full_prob(
      self,
      params: hooks.Params,
      query: Float[Array, "B T N H"],
      positions: Int[Array, "B T"],
  ) -> Float[Array, "B"]:
    """Returns p of each text."""
    pooled = flux_router.pooled(query, positions, self.pool)
    return flux_router.full_prob(params, pooled)

  def carry(
      self, params: hooks.Params, call: hooks.Call, made: hooks.Made
  ) -> Float[Array, "B T"]:
    """Returns how many layers so far are sparse, the same for all tokens."""
    share = self.full_share(params, made.query, call.positions)
    before = call.carry.get(self.name)
    own = jnp.broadcast_to(1 - share[:, None], call.positions.shape)
    return own if before is None else before + own

  def losses(
      self, params: hooks.Params, call: hooks.Call, made: hooks.Made
  ) -> dict[str, Float[Array, ""]]:
    """Returns the price of missing the target, of the last layer alone."""
    if "multipliers" not in params:
      return {}
    sparse = (
        self.carry(params, call, made)[:, 0].mean() / call.config.num_layers
    )
    price = flux_router.price(params["multipliers"], sparse, self.target)
    return {"target": price}

  def probe(
      self, params: hooks.Params, call: hooks.Call, made: hooks.Made
  ) -> dict[str, Float[Array, "B"]]:
    """Returns p of each text, unless the route is forced."""
    if self.force:
      return {}
    return {"full_prob": self.full_prob(params, made.query, call.positions)}

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> hooks.KVCache:
    """Returns an empty cache, which keeps everything, and the route."""
    return flux_cache.init(self, config, layer, batch_size, capacity, dtype)
