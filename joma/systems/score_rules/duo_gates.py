"""Duo gates: each key head between all keys and a stream of the newest.

  weights = alpha softmax(logits) + (1 - alpha) softmax(logits of the stream)

where the stream is the first keys and the newest ones, and alpha a number of
each key head. Trained alone, with its size as a loss, alpha tells the heads
that retrieve, which need all keys, from those that do not (DuoAttention,
https://arxiv.org/abs/2410.10819): `joma.systems.profiles.retrieval_heads`.
XLA only: no kernel adds two softmaxes of one query.

Paper's settings: a penalty of .05.

Letters: N query heads, K key and value heads, G = N / K, S keys.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.transformer import config as configs
from joma.transformer import hooks
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class DuoGates:
  """A score rule.

  Attributes:
    sinks: First keys of the stream.
    recent: Its newest keys, a query's own included.
    start: alpha before training; 1 is attention.
  """

  name: ClassVar[str] = "duo_gates"
  paper: ClassVar[str] = "https://arxiv.org/abs/2410.10819"
  neutral: ClassVar[str] = "duo_gates"
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {"alpha": ("tensor",)}

  sinks: int = 4
  recent: int = 256
  start: float = 1.0

  def __post_init__(self):
    require.at_least("duo_gates: sinks", self.sinks, 0)
    require.at_least("duo_gates: recent", self.recent, 1)

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns `alpha`, float32 [K]."""
    return {"alpha": jnp.full((config.num_kv_heads,), self.start, jnp.float32)}

  def weights(self, params: hooks.Params, call: hooks.Call) -> hooks.WeightRule:
    """A rule of both softmaxes."""
    num_groups = call.config.num_heads // call.config.num_kv_heads
    alpha = jnp.repeat(params["alpha"], num_groups)
    return hooks.WeightRule(
        name=self.name, normalize=lambda logits: self.of_logits(logits, alpha)
    )

  def of_logits(
      self, attn_logits: Float[Array, "B _ _ S"], alpha: Float[Array, "N"]
  ) -> Float[Array, "B _ _ S"]:
    """Weights of logits.

    Args:
      attn_logits: Of a pass [B, N, T, S], of a step [B, K, G, S]; -inf where
        nothing is seen.
      alpha: Of the query heads.
    """
    place = jnp.arange(attn_logits.shape[-1])[None, None, None]
    is_seen = ~jnp.isneginf(attn_logits)
    newest = jnp.where(is_seen, place, -1).max(axis=-1, keepdims=True)
    is_near = (place < self.sinks) | (place > newest - self.recent)
    # A row of nothing is weighed evenly: its weights count for nothing.
    logits = jnp.where(newest < 0, 0.0, attn_logits)
    stream = jnp.where(is_near | (newest < 0), logits, -jnp.inf)
    alpha = alpha.reshape(attn_logits.shape[1], -1)[None, :, :, None]
    return alpha * jax.nn.softmax(logits) + (1 - alpha) * jax.nn.softmax(stream)
