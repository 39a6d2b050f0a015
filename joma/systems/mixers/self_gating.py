"""Scores that ask no query: a running mean of values by how loud a key is.

  a_ts  = softmax over s <= t of scale silu(q_s) k_s
  out_t = sum_s a_ts v_s

The non-approximate form of Deconstructing Attention
(https://arxiv.org/abs/2510.11602): the score of a key does not depend on who
asks, so that a row is the one before and a step of a running mean: O(T), and a
state of one size. XLA only.

Paper's settings: 500M parameters, 15B tokens.

Letters: B batch, T tokens, N query heads, K key and value heads, H head size.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import layer_hooks
from kernels_pallas import masks

# Log of the weights so far [B, T, N], and their mean of values [B, T, N, H].
Running = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class SelfGating:
  """A mixer."""

  name: ClassVar[str] = "self_gating"
  paper: ClassVar[str] = "https://arxiv.org/abs/2510.11602"
  neutral: ClassVar[str] = ""

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
    seen = jnp.ones(query.shape[:2], bool)
    _, mean = running_means(steps(query, key, value, seen, call.options.scale))
    return mean.astype(query.dtype)

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> hooks.KVCache:
    """Returns the state of nothing, the same for every capacity."""
    heads = (batch_size, config.num_heads)
    return RunningMean(
        jnp.full(heads, -jnp.inf, jnp.float32),
        jnp.zeros((*heads, config.head_dim)),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunningMean:
  """A KVCache of one layer.

  Attributes:
    total: Log of the sum of weights, float32 [B, N].
    mean: Of the values, float32 [B, N, H].
  """

  total: PyTree
  mean: PyTree
  honours: ClassVar[tuple[str, ...]] = (SelfGating.name,)

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "RunningMean"]:
    """Any number of tokens after those before; padding adds nothing."""
    more = steps(query, key, value, positions >= 0, options.scale)
    before = (self.total[:, None], self.mean[:, None])
    both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), before, more)
    total, mean = running_means(both)
    after = RunningMean(total[:, -1], mean[:, -1])
    return mean[:, 1:].astype(query.dtype), after


def steps(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    is_token: Array,
    scale: float,
) -> Running:
  """Each token by itself: log weight and value, float32."""
  num_groups = query.shape[2] // key.shape[2]
  repeat = lambda x: jnp.repeat(x, num_groups, axis=2).astype(jnp.float32)
  gated = jax.nn.silu(query.astype(jnp.float32)) * repeat(key)
  score = jnp.where(is_token[..., None], scale * gated.sum(axis=-1), -jnp.inf)
  return score, repeat(value)


def running_means(each: Running) -> Running:
  """Log sums and means of all tokens up to each."""

  def join(one: Running, two: Running) -> Running:
    # Of the difference: shares sum to 1 whatever the size of the scores.
    lead = jnp.where(jnp.isneginf(two[0]), jnp.inf, one[0] - two[0])
    share = jax.nn.sigmoid(lead)[..., None]
    mean = share * one[1] + (1 - share) * two[1]
    return jnp.logaddexp(one[0], two[0]), mean

  found: Any = jax.lax.associative_scan(join, each, axis=1)
  return found
