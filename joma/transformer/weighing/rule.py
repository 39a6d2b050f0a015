"""What takes the place of softmax, and the algebra of its parts.

  logits_ts  = soft_cap(scale q_t k_s) + bias_ts,  -inf where nothing is seen
  weights_ts = exp(logits_ts) / (rest_t + sum_s' exp(logits_ts'))
  out_t      = sum_s weights_ts v_s + what the rest gives

The rest is a learned logit of each head, or learned keys before the text's,
with values or without. A rule of its own, `normalize`, takes the place of the
second line.

Letters: B batch, T queries, S keys, N query heads, K key and value heads, G =
N / K, H head size, E learned keys.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import logits as logits_lib
from kernels_pallas import masks

# Of queries [B, T, N, H], their positions [B, T] and keys' [B, S].
Bias = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightRule:
  """How attention weights follow from logits.

  Attributes:
    name: Of the system, for messages.
    sink_logits: Logits [N] of a key without value, in softmax; None is none.
    extra_keys: Learned keys [K, E, H] that every query sees besides the text's,
      not rotated; None is none. Not together with sinks.
    extra_values: Their values [K, E, H]; None is 0.
    bias: Added to the logits [B, N, T, S] or broadcast to them, of queries as
      the product reads them; None is 0.
    normalize: Weights of logits [..., S], each row by itself, -inf where
      nothing is seen; rows of nothing must have finite weights. None is
      softmax.
  """

  name: str
  sink_logits: Float[Array, "N"] | None = None
  extra_keys: Float[Array, "K E H"] | None = None
  extra_values: Float[Array, "K E H"] | None = None
  bias: Bias | None = None
  normalize: Callable[[Array], Array] | None = None

  @property
  def kind(self) -> str:
    """What a cache must list among its `honours` to follow the rule."""
    if not self.is_softmax:
      return "weights"
    return "sinks" if self.extra_keys is None else "keys"

  @property
  def is_softmax(self) -> bool:
    """Whether ops can follow it, which know softmax and what adds to it."""
    return self.normalize is None and self.bias is None

  @property
  def of_heads(self) -> dict[str, Array]:
    """Its arrays, whose first axes are heads."""
    names = ("sink_logits", "extra_keys", "extra_values")
    found = {name: getattr(self, name) for name in names}
    return {name: x for name, x in found.items() if x is not None}


def rest_logits(
    rule: WeightRule | None,
    query: Float[Array, "B T N H"],
    scale: float,
    cap: float | None,
) -> Float[Array, "#B N #T E"] | None:
  """Logits of what is seen besides the text; None where nothing is."""
  if rule is None:
    return None
  if rule.sink_logits is not None:
    return rule.sink_logits[None, :, None, None]
  if rule.extra_keys is None:
    return None
  batch, length, num_heads, head_dim = query.shape
  num_kv_heads, num_keys, _ = rule.extra_keys.shape
  grouped = query.reshape(batch, length, num_kv_heads, -1, head_dim)
  products = jnp.einsum(
      "BTKGH,KEH->BKGTE",
      grouped,
      rule.extra_keys.astype(query.dtype),
      preferred_element_type=jnp.float32,
  )
  products = products.reshape(batch, num_heads, length, num_keys)
  return logits_lib.soft_cap(scale * products, cap)


def softmax(
    attn_logits: Float[Array, "*b S"], rest: Float[Array, "..."] | None
) -> tuple[Float[Array, "*b S"], Float[Array, "*b E"] | None]:
  """Softmax over the last axis, with more logits where there is a rest.

  Args:
    attn_logits: Logits, -inf where nothing is seen.
    rest: Of what is seen besides, [..., E]; broadcasts to the rows.

  Returns:
    The weights of both.
  """
  if rest is None:
    return jax.nn.softmax(attn_logits), None
  more = jnp.asarray(masks.to_rank(rest, attn_logits.ndim), attn_logits.dtype)
  more = jnp.broadcast_to(more, (*attn_logits.shape[:-1], more.shape[-1]))
  both = jax.nn.softmax(jnp.concatenate([attn_logits, more], axis=-1))
  num_keys = attn_logits.shape[-1]
  return both[..., :num_keys], both[..., num_keys:]


def weights(
    attn_logits: Float[Array, "*b S"],
    rule: WeightRule | None,
    rest: Float[Array, "..."] | None,
) -> tuple[Float[Array, "*b S"], Float[Array, "*b E"] | None]:
  """Weights of logits by a rule, None is softmax; and those of the rest."""
  if rule is not None and rule.normalize is not None:
    return rule.normalize(attn_logits), None
  return softmax(attn_logits, rest)


def shares(attn_weights: Float[Array, "*b S"]) -> Float[Array, "*b S"]:
  """Absolute weights divided by their sum: what stands in for softmax's.

  A proxy, by which weights without row sums are compared with those of softmax
  (https://arxiv.org/abs/2410.10781). A row of zeros stays one.
  """
  size = jnp.abs(attn_weights)
  total = size.sum(axis=-1, keepdims=True)
  return size / jnp.where(total == 0, 1, total)


def extra_values(
    rule: WeightRule | None, like: Float[Array, "B T #N H"]
) -> Float[Array, "B E K H"] | None:
  """Values of learned keys, a copy for each sequence; None where all are 0."""
  if rule is None or rule.extra_values is None:
    return None
  values = rule.extra_values.astype(like.dtype).swapaxes(0, 1)[None]
  return jnp.broadcast_to(values, (len(like), *values.shape[1:]))
