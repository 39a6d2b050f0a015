"""Attention that queries to come will give, in closed form.

Letters: B batch, T tokens of a prompt, K key and value heads, G query heads of
each, C slots, H head size.
"""

from collections.abc import Callable
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from joma.systems.cache_policies.by_key import directions
from joma.transformer import hooks
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedAttention(policy_lib.Policy):
  """Attention that future queries will give, in closed form (2510.00636).

  Queries are taken as normal, with the mean and covariance of those so far
  before rotation, turned by the mean rotation of the positions to come:

    E exp(scale q.k) = exp(scale mean.k + scale^2 k^T cov k / 2)

  normalized over the kept keys after the sinks, averaged over the group of a
  key head, times the norm of the value. A key is judged once, when it enters.

  Paper's settings: 4 sinks, the mean over 512 positions to come.

  Attributes:
    num_future: Positions to come.
  """

  label: ClassVar[str] = "Expected Attention"
  uses_queries: ClassVar[bool] = True
  num_sinks: int = 4
  num_recent: int | None = 0
  num_future: int = 512

  def __post_init__(self):
    super().__post_init__()
    if self.num_future < 1:
      raise errors.UserError(
          f"num_future={self.num_future} must be at least 1."
      )

  def init_aux(
      self, batch: int, num_kv_heads: int, capacity: int, num_groups: int
  ) -> rules.Arrays:
    empty = jnp.zeros((batch, num_kv_heads, capacity))
    return jnp.zeros((*empty.shape, num_groups)), empty

  def init_state(
      self, batch: int, num_kv_heads: int, head_dim: int, num_groups: int
  ) -> rules.Arrays:
    heads = (batch, num_kv_heads, num_groups, head_dim)
    return jnp.zeros(batch), jnp.zeros(heads), jnp.zeros((*heads, head_dim))

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    num_kv_heads, head_dim = prompt.key.shape[2:]
    is_counted = prompt.positions >= self.num_sinks
    query = prompt.raw_query.astype(jnp.float32)
    query = query.reshape(*query.shape[:2], num_kv_heads, -1, head_dim)
    query = jnp.where(is_counted[..., None, None, None], query, 0.0)
    state = (
        is_counted.sum(axis=1).astype(jnp.float32),
        query.sum(axis=1),
        jnp.einsum("BTKGH,BTKGI->BKGHI", query, query, precision="highest"),
    )
    key = prompt.key.astype(jnp.float32)
    judge = self._judge(
        state, prompt.lengths, prompt.rotate, prompt.options.scale, head_dim
    )
    aux = judge(key).swapaxes(1, 2), directions.norm(prompt.value).swapaxes(
        1, 2
    )
    return jnp.zeros(aux[1].shape), aux, state

  def enter(
      self, token: policy_lib.Token, state: rules.Arrays
  ) -> rules.Entered:
    count, total, square = state
    query = token.raw_query.astype(jnp.float32)
    is_counted = token.position >= self.num_sinks
    query = jnp.where(is_counted[:, None, None, None], query, 0.0)
    state = (
        count + is_counted,
        total + query,
        square + query[..., :, None] * query[..., None, :],
    )
    judge = self._judge(
        state, token.position + 1, token.rotate, token.scale, query.shape[-1]
    )
    expected = judge(token.key.astype(jnp.float32)[:, None])[:, 0]
    zeros = jnp.zeros(token.key.shape[:2])
    return zeros, (expected, directions.norm(token.value)), state

  def priority(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Num[Array, "B K C"]:
    logits, value_norm = slots.aux
    is_judged = (slots.pos >= self.num_sinks)[..., None]
    logits = jnp.where(is_judged, logits, -jnp.inf)
    expected = jax.nn.softmax(logits, axis=2).mean(axis=-1)
    return jnp.where(is_judged[..., 0], expected * value_norm, 0.0)

  def _judge(
      self,
      state: tuple[Array, Array, Array],
      start: Int[Array, "B"],
      rotate: hooks.Rotate,
      scale: float,
      head_dim: int,
  ) -> Callable[[Array], Array]:
    """Returns key [B, T, K, H] -> log of the expectation [B, T, K, G]."""
    count, total, square = state
    count = jnp.maximum(count, 1)[:, None, None, None]
    mean = total / count
    outer = mean[..., :, None] * mean[..., None, :]
    covariance = square / count[..., None] - outer
    future = start[:, None] + jnp.arange(self.num_future)[None]
    basis = jnp.broadcast_to(
        jnp.eye(head_dim)[None, None],
        (*future.shape, head_dim, head_dim),
    )
    turn = rotate(basis, future).mean(axis=1)  # [B, H, H]: rows are R e_i.
    mean = jnp.einsum("BHI,BKGH->BKGI", turn, mean, precision="highest")
    covariance = jnp.einsum(
        "BHI,BKGHJ,BJL->BKGIL", turn, covariance, turn, precision="highest"
    )

    def judge(key: Float[Array, "B T K H"]) -> Float[Array, "B T K G"]:
      first = jnp.einsum("BTKH,BKGH->BTKG", key, mean, precision="highest")
      second = jnp.einsum(
          "BTKH,BKGHI,BTKI->BTKG", key, covariance, key, precision="highest"
      )
      return scale * first + scale**2 * second / 2

    return judge
