"""A key bias: learned keys before the text, that no token owns.

  attn_weights_s = exp(l_s) / (sum_e exp(l*_e) + sum_s' exp(l_s'))
  l*_e           = soft_cap(scale q k*_e)
  out            = sum_s w_s v_s + sum_e w*_e v*_e

Every query sees the learned keys, which are not rotated and are no queries.
With values of 0 (k-bias) a head may attend to nothing, and the first token need
not be a sink; with learned ones (kv-bias) it reads a constant instead. When
Attention Sink Emerges (https://arxiv.org/abs/2410.10781). A key of 0 is a sink
logit of 0.

Paper's settings: one key a head, 60M parameters, 5B tokens.

Letters: K key and value heads, E learned keys, H head size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from joma.transformer import config as configs
from joma.transformer import hooks
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class KeyBias:
  """A score rule.

  Attributes:
    keys: E, learned keys of each head.
    values: Whether they have values, which start at 0.
    start: Standard deviation of the keys before training.
  """

  name: ClassVar[str] = "key_bias"
  paper: ClassVar[str] = "https://arxiv.org/abs/2410.10781"
  neutral: ClassVar[str] = ""
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
      "keys": ("tensor", None, None),
      "values": ("tensor", None, None),
  }

  keys: int = 1
  values: bool = False
  start: float = 0.02

  def __post_init__(self):
    require.at_least("key_bias: keys", self.keys, 1)

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns `keys`, and `values` if there are any, float32 [K, E, H]."""
    shape = (config.num_kv_heads, self.keys, config.head_dim)
    params = {"keys": self.start * jax.random.normal(key, shape)}
    return params | ({"values": jnp.zeros(shape)} if self.values else {})

  def weights(self, params: hooks.Params, call: hooks.Call) -> hooks.WeightRule:
    """Softmax over the learned keys and the text's."""
    return hooks.WeightRule(
        name=self.name,
        extra_keys=params["keys"],
        extra_values=params.get("values"),
    )
