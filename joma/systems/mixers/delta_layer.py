"""What layers of the gated delta rule share: vectors, norm, and their state.

  q, k, v = silu(causal convolution of the projections, of w tokens)
  out     = scale_c rms_norm(rule(q / |q|, k / |k|, v, decay, beta)) act(gate)

`delta_state` has the state of a text so far.

Letters: B batch, T tokens, D width, N query heads, K key and value heads, H
head size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.systems import newest_inputs
from joma.systems.mixers import delta_rule
from joma.systems.mixers import delta_state
from joma.systems.mixers import documents
from joma.systems.score_rules import convolved
from joma.transformer import config as configs
from joma.transformer import hooks
from kernels_pallas import masks
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class DeltaLayer:
  """A mixer, but for its rates and what opens its gate.

  Attributes:
    width: w of the convolutions, a token's own place included.
    epsilon: Of the norm, beside the mean square.
    start: Largest A that is drawn for a head, whose decay of a token is at most
      e^(-A softplus): 16 is the paper's, of which many heads make some last; of
      few heads none may.
  """

  name: ClassVar[str]
  width: int = 4
  epsilon: float = 1e-5
  start: float = 16.0

  def __post_init__(self):
    require.at_least(f"{self.name}: width", self.width, 1)
    require.positive(f"{self.name}: epsilon", self.epsilon)
    require.positive(f"{self.name}: start", self.start)

  def rates(
      self, params: hooks.Params, x: Float[Array, "B T D"]
  ) -> tuple[Float[Array, "B T N *d"], Float[Array, "B T N"]]:
    """Returns logarithms of decays, of heads or of channels too, and beta."""
    raise NotImplementedError

  def opening(
      self, params: hooks.Params, x: Float[Array, "B T D"]
  ) -> Float[Array, "B T N H"]:
    """Returns what the normed outputs are multiplied by, float32."""
    raise NotImplementedError

  def mix(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      mask: masks.Mask,
  ) -> Float[Array, "B T N H"]:
    """Returns the heads' outputs of texts or documents, no other masks."""
    found = documents.of_mask(self.name, call, mask, len(query))
    since, made = found.since(), []
    vectors = (query, key, value)
    for part, x in zip(newest_inputs.PARTS, vectors, strict=True):
      before = jnp.zeros((len(x), self.width - 1, *x.shape[2:]), x.dtype)
      both = jnp.concatenate([before, x], axis=1)
      made.append(convolved.convolve(both, params[part], x.shape[1], since))
    log_decay, beta = self.rates(params, call.x)
    arrays = (*delta_rule.unit(made, query.shape[2]), log_decay, beta)
    more = {} if found.starts is None else {"segment_starts": found.starts}
    result = delta_rule.rule(call.options, arrays, **more)
    out = delta_state.finish(self, params, call.x, result.out)
    return found.checked(out)

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> hooks.KVCache:
    """Returns the empty state, the same for every capacity."""
    return delta_state.init(self, config, batch_size)


def draw_shared(
    key: Array, config: configs.TransformerConfig, width: int
) -> dict[str, Array]:
  """Draws kernels [w, N, H] or [w, K, H], W_beta [D, N] and scales [H]."""
  heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
  keys = jax.random.split(key, 4)
  found = {
      part: width**-0.5 * jax.random.normal(one, (width, num, config.head_dim))
      for part, num, one in zip(newest_inputs.PARTS, heads, keys, strict=False)
  }
  shape = (config.embed_dim, config.num_heads)
  beta = config.embed_dim**-0.5 * jax.random.normal(keys[3], shape)
  return found | {"beta": beta, "scale": jnp.ones((config.head_dim,))}


def draw_decay(
    key: Array, num_heads: int, shape: tuple[int, ...], largest: float
) -> dict[str, Array]:
  """Draws log A [N] and biases by which softplus is .001 to .1.

  Args:
    key: Of the draws.
    num_heads: N.
    shape: Of the biases.
    largest: A is from a 1600th of it to it.
  """
  by_head, by_time = jax.random.split(key)
  size = jax.random.uniform(
      by_head, (num_heads,), minval=largest / 1600, maxval=largest
  )
  times = jnp.exp(
      jax.random.uniform(
          by_time, shape, minval=jnp.log(1e-3), maxval=jnp.log(1e-1)
      )
  )
  bias = times + jnp.log(-jnp.expm1(-times))
  return {"decay_log": jnp.log(size), "decay_bias": bias}
