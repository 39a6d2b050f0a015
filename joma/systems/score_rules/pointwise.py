"""Weights that need not know each other: a function of each logit.

  weights_ts = f(l_ts) / norm(sum_s' f(l_ts'))

  form       f                    norm of row sums
  sigmoid    sigmoid(l + b_n)     sum + 1e-8      b learned, a number a head
  elu        elu(l) + 1           sum + 1e-8
  identity   l                    max(|sum|, 1)
  taylor     1 + l + l^2 / 2      sum             exp to second order
  uniform    1                    sum             1 / t: no logit matters

with row sums or without: When Attention Sink Emerges
(https://arxiv.org/abs/2410.10781) finds no sinks for sigmoid without them;
taylor is the approximate form of Deconstructing Attention
(https://arxiv.org/abs/2510.11602). elu + 1 is exp where logits are not
positive: there it is softmax. XLA only, some queries at a time: memory O(T),
forward and backward.

Paper's settings: 60M parameters, 5B tokens; sigmoid up to 1B.

Letters: N query heads, S keys.
"""

from collections.abc import Callable
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.transformer import config as configs
from joma.transformer import hooks
from scansnap_jax.experiment import errors

_FORMS: dict[str, Callable[[Array], Array]] = {
    "sigmoid": jax.nn.sigmoid,
    "elu": lambda x: jax.nn.elu(x) + 1,
    "identity": lambda x: x,
    "taylor": lambda x: 1 + x + jnp.square(x) / 2,
    "uniform": jnp.ones_like,
}


@dataclasses.dataclass(frozen=True)
class Pointwise:
  """A score rule.

  Attributes:
    form: f: sigmoid, elu, identity, taylor or uniform.
    sums: Whether rows are divided by their sums.
    start: b before training; - ln of the length starts like softmax.
  """

  name: ClassVar[str] = "pointwise"
  paper: ClassVar[str] = "https://arxiv.org/abs/2410.10781"
  neutral: ClassVar[str] = ""
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {"bias": ("tensor",)}

  form: str = "sigmoid"
  sums: bool = False
  start: float = 0.0

  def __post_init__(self):
    if self.form not in _FORMS:
      raise errors.UserError(
          f"pointwise: form={self.form!r} is none of {', '.join(_FORMS)}."
      )

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns `bias`, b float32 [N]; of other forms nothing."""
    is_biased = self.form == "sigmoid"
    return (
        {"bias": jnp.full((config.num_heads,), self.start, jnp.float32)}
        if is_biased
        else {}
    )

  def weights(self, params: hooks.Params, call: hooks.Call) -> hooks.WeightRule:
    """A rule of each logit alone, and of row sums."""
    bias = params.get("bias")
    return hooks.WeightRule(
        name=self.name,
        bias=None if bias is None else lambda *_: bias[None, :, None, None],
        normalize=self.of_logits,
    )

  def of_logits(
      self, attn_logits: Float[Array, "*b S"]
  ) -> Float[Array, "*b S"]:
    """Weights of logits; -inf has none, a row of nothing sums to 0."""
    is_seen = ~jnp.isneginf(attn_logits)
    # What is not seen must not be infinite in the backward pass.
    found = _FORMS[self.form](jnp.where(is_seen, attn_logits, 0.0))
    found = jnp.where(is_seen, found, 0.0)
    if not self.sums:
      return found
    total = found.sum(axis=-1, keepdims=True)
    if self.form == "identity":
      return found / jnp.maximum(jnp.abs(total), 1)
    return found / (total + 1e-8)
