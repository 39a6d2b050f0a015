"""Learned sink logits: a key of each head that has a logit and no value.

  attn_weights_s = exp(l_s) / (exp(sink) + sum_s' exp(l_s'))

so that a head may attend to nothing, which softmax can only do by giving the
first tokens its mass. The form of gpt-oss (arXiv 2508.10925, equation of its
attention; Evan Miller's "Attention is off by one" has the sink at 0). As the
sink falls to minus infinity it is softmax.

Paper's settings: one logit a head, in every layer (gpt-oss).

Letters: N query heads.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from joma.transformer import config as configs
from joma.transformer import hooks


@dataclasses.dataclass(frozen=True)
class SinkLogits:
  """A score rule: softmax with one more logit in its denominator.

  Attributes:
    start: The sinks before training; 0 takes half from a single key of logit 0.
  """

  name: ClassVar[str] = "sink_logits"
  paper: ClassVar[str] = "https://arxiv.org/abs/2508.10925"
  neutral: ClassVar[str] = "sink_logits:start=-1e9"
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {"logits": ("tensor",)}

  start: float = 0.0

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns `logits`, float32 [N]."""
    return {"logits": jnp.full((config.num_heads,), self.start, jnp.float32)}

  def weights(self, params: hooks.Params, call: hooks.Call) -> hooks.WeightRule:
    """Softmax with the sinks, which every op of attention knows."""
    return hooks.WeightRule(name=self.name, sink_logits=params["logits"])
