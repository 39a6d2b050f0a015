"""Titans' memory: a network whose weights are learned as the text is read.

  out = scale_c rms_norm(M_t(q_t)) silu(x W_z),   M as in `titans_memory`
  eta = sigmoid(x W_eta + b),  theta = r sigmoid(x W_theta + b),
  alpha = sigmoid(x W_alpha + b)

of unit queries and keys after a short convolution, as in `gdn`
(https://arxiv.org/abs/2501.00663). A linear memory (depth 1) without momentum
and without forgetting, in chunks of one, is the delta rule with beta = 2 theta;
with forgetting it is not the gated one, whose decay multiplies what is erased
too. The first weights are parameters: a network of zeros has no gradient and
would never leave them. The layer is the memory alone: `titans,softmax` stacks
it with attention. XLA only.

Letters: B batch, T tokens, D width, N query heads, K key and value heads, H
head size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.systems import newest_inputs
from joma.systems.mixers import delta_layer
from joma.systems.mixers import delta_rule
from joma.systems.mixers.memory import titans_cache
from joma.systems.mixers.memory import titans_memory
from joma.systems.score_rules import convolved
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import layer_hooks
from kernels_pallas import masks
from scansnap_jax.experiment import require

# Where sigmoids begin: steps of a tenth of the greatest, little forgetting.
_BIASES = {"keep": 0.0, "rate": -2.2, "forget": -4.0}
_LAYERS = 8


@dataclasses.dataclass(frozen=True)
class Titans:
  """A mixer.

  Attributes:
    depth: d, layers of the network.
    chunk: Tokens whose gradients are of the same weights.
    rate: r, greatest step, half of it for squares that are summed.
    loss: sum, or mean over channels.
    gelu: tanh, or erf, of the error function.
    momentum: Whether there is eta; else it is 0.
    forget: Whether there is alpha; else it is 0.
    width: w of the convolutions, a token's own place included.
    epsilon: Of the norm, beside the mean square.
  """

  name: ClassVar[str] = "titans"
  paper: ClassVar[str] = "https://arxiv.org/abs/2501.00663"
  neutral: ClassVar[str] = ""
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
      **{part: (None, "tensor", None) for part in newest_inputs.PARTS},
      **{name: ("fsdp", "tensor") for name in _BIASES},
      **{f"{name}_bias": ("tensor",) for name in _BIASES},
      **{f"layer_{i}": ("tensor", None, None) for i in range(_LAYERS)},
      "gate": ("fsdp", "tensor", None),
      "scale": (None,),
  }

  depth: int = 2
  chunk: int = 16
  rate: float = 0.5
  loss: str = "sum"
  gelu: str = "tanh"
  momentum: bool = True
  forget: bool = True
  width: int = 4
  epsilon: float = 1e-5

  def __post_init__(self):
    require.between("titans: depth", self.depth, 1, _LAYERS)
    require.at_least("titans: chunk", self.chunk, 1)
    require.at_least("titans: width", self.width, 1)
    require.positive("titans: rate", self.rate)
    require.positive("titans: epsilon", self.epsilon)
    require.one_of("titans: loss", self.loss, ("sum", "mean"))
    require.one_of("titans: gelu", self.gelu, ("tanh", "erf"))

  @property
  def rule(self) -> titans_memory.Rule:
    """Of the memory."""
    return titans_memory.Rule(self.loss == "mean", self.gelu == "erf")

  @property
  def rates(self) -> tuple[str, ...]:
    """Of the three those that there are."""
    has = {"keep": self.momentum, "rate": True, "forget": self.forget}
    return tuple(name for name, is_there in has.items() if is_there)

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns kernels of convolutions, rates, first weights, gate and scale."""
    keys = iter(jax.random.split(key, 5 + self.depth))
    size, heads, head_dim = config.embed_dim, config.num_heads, config.head_dim
    normal = lambda of, *shape: of**-0.5 * jax.random.normal(next(keys), shape)
    found = delta_layer.draw_shared(next(keys), config, self.width)
    found.pop("beta")  # The rates below take its place.
    for name in self.rates:
      found[name] = normal(size, size, heads)
      found[f"{name}_bias"] = jnp.full((heads,), _BIASES[name], jnp.float32)
    for i in range(self.depth):
      found[f"layer_{i}"] = normal(head_dim, heads, head_dim, head_dim)
    return found | {"gate": normal(size, size, heads, head_dim)}

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
    both, vectors = {}, (query, key, value)
    for part, x in zip(newest_inputs.PARTS, vectors, strict=True):
      before = jnp.zeros((len(x), self.width - 1, *x.shape[2:]), x.dtype)
      both[part] = jnp.concatenate([before, x], axis=1)
    tokens = self.tokens(params, call.x, both)
    lengths = jnp.full(len(query), query.shape[1])
    state = titans_memory.begin(self.first(params), len(query))
    out, _ = titans_memory.sweep(state, tokens, lengths, self.chunk, self.rule)
    return self.finish(params, call.x, out).astype(query.dtype)

  def first(self, params: hooks.Params) -> titans_memory.Weights:
    """Weights before the first token."""
    return tuple(params[f"layer_{i}"] for i in range(self.depth))

  def tokens(
      self,
      params: hooks.Params,
      x: Float[Array, "B T D"],
      both: dict[str, Array],
  ) -> titans_memory.Tokens:
    """What the memory learns and is asked.

    Args:
      params: Of the layer.
      x: What it reads.
      both: Queries, keys and values by name, the w - 1 inputs before them
        first.
    """
    made = [
        convolved.convolve(both[part], params[part], x.shape[1])
        for part in newest_inputs.PARTS
    ]
    vectors = delta_rule.unit(made, params["gate"].shape[1])
    wide = x.astype(jnp.float32)
    rates = {name: jnp.zeros(vectors[0].shape[:3]) for name in _BIASES}
    for name in self.rates:
      opening = jnp.einsum("BTD,DN->BTN", wide, params[name])
      bias = params[f"{name}_bias"][None, None]
      rates[name] = jax.nn.sigmoid(opening + bias)
    rates["rate"] = self.rate * rates["rate"]
    return titans_memory.Tokens(
        *(x.astype(jnp.float32) for x in vectors), **rates
    )

  def finish(
      self,
      params: hooks.Params,
      x: Float[Array, "B T D"],
      out: Float[Array, "B T N H"],
  ) -> Float[Array, "B T N H"]:
    """Norms what was recalled and opens its gate, float32."""
    size = jnp.square(out).mean(axis=-1, keepdims=True)
    out = out * jax.lax.rsqrt(size + self.epsilon)
    gate = params["gate"].astype(x.dtype)
    opening = jnp.einsum("BTD,DNH->BTNH", x, gate).astype(jnp.float32)
    return out * params["scale"][None, None, None] * jax.nn.silu(opening)

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> hooks.KVCache:
    """Returns the state before the first token, the same for every capacity."""
    return titans_cache.init(self, config, batch_size)
