"""NAtS-L: each chunk is kept as keys and values, or folded into a state.

  route    = the greater of mean of x over the chunk W_r, for each key head
  soft     = attention to the chunks that are kept, and to a query's own so far
  linear   = gated delta rule over the others, and over a query's own so far
  out      = (a norm(soft) + b norm(linear)) silu(x W_z),  (a, b) = softmax(q W)

Neural attention search for long texts (https://arxiv.org/abs/2602.03681). Both
ways share queries, keys and values, which have passed a short convolution and
silu; those of the linear way are unit, those of the soft way normed, with
scales and without positions. The state fades over chunks that are kept too. A
chunk is routed when it is complete, so that nothing later is seen. Forward the
choice is hard; backward what was chosen has the gradient of its probability,
and what was not has none.

Ours has as many heads in both ways, and one route for the heads of a group.
`nats_text` reads whole texts, `nats_cache` goes on.

Paper's settings: chunks of 64, 12 heads of softmax and 6 linear, 340M
parameters; 16 of 21 layers are Gated DeltaNet alone.

Letters: B batch, T tokens, D width, N query heads, K key and value heads, H
head size, C chunks.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from joma.systems.mixers import gdn
from joma.systems.routers import nats_cache
from joma.systems.routers import nats_text
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import layer_hooks
from kernels_pallas import masks
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class Nats:
  """A mixer.

  Attributes:
    chunk: Tokens of a chunk.
    slots: Chunks that a cache has room for, for each key head; 0 is all of a
      text.
    width: w of the convolutions, a token's own place included.
    epsilon: Of the norms, beside the mean square.
    force: soft or linear, for all chunks; empty leaves it to the router.
  """

  name: ClassVar[str] = "nats"
  paper: ClassVar[str] = "https://arxiv.org/abs/2602.03681"
  neutral: ClassVar[str] = ""
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
      **gdn.Gdn.axes,
      "route": ("fsdp", "tensor", None),
      "mix": ("tensor", None, None),
      **{part: (None,) for part in ("soft", "soft_query", "soft_key")},
  }

  chunk: int = 64
  slots: int = 0
  width: int = 4
  epsilon: float = 1e-5
  force: str = ""

  def __post_init__(self):
    require.at_least("nats: chunk", self.chunk, 1)
    require.at_least("nats: slots", self.slots, 0)
    if self.force:
      require.one_of("nats: force", self.force, ("soft", "linear"))
    require.at_least("nats: width", self.width, 1)
    require.positive("nats: epsilon", self.epsilon)

  @property
  def rule(self) -> gdn.Gdn:
    """What the linear way's vectors, rates and gate are of."""
    return gdn.Gdn(width=self.width, epsilon=self.epsilon)

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns `gdn`'s, W_r [D, K, 2], W [N, H, 2] and scales of norms [H]."""
    keys, size = jax.random.split(key, 3), config.head_dim
    normal = lambda key, *shape: jax.random.normal(key, shape)
    found = {
        **self.rule.init_params(keys[0], config, layer),
        "mix": size**-0.5 * normal(keys[1], config.num_heads, size, 2),
        **{p: jnp.ones((size,)) for p in ("soft", "soft_query", "soft_key")},
    }
    if not self.force:
      shape = (config.embed_dim, config.num_kv_heads, 2)
      found["route"] = config.embed_dim**-0.5 * normal(keys[2], *shape)
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
    lengths = jnp.full(len(query), query.shape[1])
    return nats_text.read(self, params, call, (query, key, value), lengths).out

  def routes(
      self, params: hooks.Params, mean: Float[Array, "B C D"]
  ) -> tuple[Bool[Array, "B C K"], Float[Array, "B C K"]]:
    """Which chunks are kept, and the probability of what was chosen.

    Args:
      params: Of the layer.
      mean: Of the layer's input over each chunk, float32.
    """
    if self.force:
      heads = params["key"].shape[1]
      shape = (*mean.shape[:2], heads)
      return jnp.full(shape, self.force == "soft"), jnp.ones(shape)
    logits = jnp.einsum("BCD,DKI->BCKI", mean, params["route"])
    is_soft = logits[..., 0] >= logits[..., 1]
    soft = jax.nn.softmax(logits)[..., 0]
    return is_soft, jnp.where(is_soft, soft, 1 - soft)

  def probe(
      self, params: hooks.Params, call: hooks.Call, made: hooks.Made
  ) -> dict[str, Float[Array, "B C K"]]:
    """Returns the probability by which chunks are kept, the last one's too."""
    if call.has_cache:
      return {}
    is_soft, prob = self.routes(params, nats_text.means(call.x, self.chunk))
    return {"soft_prob": jnp.where(is_soft, prob, 1 - prob)}

  def finish(
      self,
      params: hooks.Params,
      x: Float[Array, "B T D"],
      query: Float[Array, "B T N H"],
      soft: Float[Array, "B T N H"],
      linear: Float[Array, "B T N H"],
  ) -> Float[Array, "B T N H"]:
    """Norms what both ways read, mixes it and opens its gate.

    Args:
      params: Of the layer.
      x: What the layer reads.
      query: After convolution and silu.
      soft: Of attention.
      linear: Of the rule.
    """
    wide = query.astype(jnp.float32)
    share = jax.nn.softmax(jnp.einsum("BTNH,NHI->BTNI", wide, params["mix"]))
    both = (
        nats_text.normed(x, params[scale], self.epsilon)
        for x, scale in ((soft, "soft"), (linear, "scale"))
    )
    mixed = jnp.einsum("BTNI,IBTNH->BTNH", share, jnp.stack([*both]))
    return (mixed * self.rule.opening(params, x)).astype(soft.dtype)

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> hooks.KVCache:
    """Returns an empty cache with room for `slots` chunks of keys."""
    return nats_cache.init(self, config, batch_size, capacity, dtype)
