"""Attention calibration: columns that get much for nothing give most back.

  S      = {s > 0: mean over queries of weights_ts > theta}
  w'_ts  = beta w_ts for s in S,  (1 - beta m_t) / (1 - m_t) w_ts for others
  m_t    = sum of w_ts over S;    a row whose m is 1 is left alone

so that rows still sum to 1, and most of what is freed goes to the first token,
which is never in S (ACT, https://arxiv.org/abs/2406.15765). Less than 1 / theta
columns can exceed theta, so that one call of the kernels and a gather of that
many keys do: out' = beta o_S + (1 - beta m) / (1 - m) (out - o_S); where m is
close to 1 float32 loses digits by 1 / (1 - m). What is in S is a matter of the
whole text, or of the prompt, whose S the tokens behind it have. Not all such
columns are useless: choose heads by what it does to them.

Paper's settings: theta .1, beta .4, layers 2 to 30, heads chosen on 900
samples.

Letters: B batch, T queries, S keys, N query heads, K key and value heads, E
columns that are looked at, H head size.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.systems import dotted
from joma.systems.score_rules.calibrated import act_cache
from joma.systems.score_rules.calibrated import columns
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import layer_hooks
from kernels_pallas import masks
from kernels_pallas.attention import api
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True)
class Act:
  """A mixer: attention, calibrated.

  Attributes:
    theta: Mean weight above which a column is in S.
    beta: What its weights are multiplied by; 1 changes nothing.
    heads: Which, by their numbers with dots between, as 0.3.5; all if empty.
  """

  name: ClassVar[str] = "act"
  paper: ClassVar[str] = "https://arxiv.org/abs/2406.15765"
  neutral: ClassVar[str] = "act:beta=1"
  sees_later: ClassVar[str] = "S is what the whole text attends to"

  theta: float = 0.1
  beta: float = 0.4
  heads: str = ""

  def __post_init__(self):
    if not 0 < self.theta < 1:
      raise errors.UserError(
          f"act: theta={self.theta} must lie in (0, 1): a mean weight."
      )
    if not 0 <= self.beta <= 1:
      raise errors.UserError(f"act: beta={self.beta} must lie in [0, 1].")
    dotted.numbers("act: heads", self.heads)

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
    query = call.rotate(query, call.positions)
    key = call.rotate(key, call.positions)
    return self.calibrated(query, key, value, call.positions, call.options)[0]

  def calibrated(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], Int[Array, "B N E"]]:
    """Attends causally; returns S too, -1 where it has fewer columns."""
    is_token = (positions >= 0).astype(jnp.float32)
    shared: Any = dict(
        scale=options.scale,
        logits_soft_cap=options.logits_soft_cap,
        implementation=options.implementation,
    )
    made = api.attention(
        query,
        key,
        value,
        where=masks.causal(query.shape[1]),
        row_weights=is_token[:, None],
        return_lse=True,
        return_col_mass=True,
        **shared,
    )
    assert made.lse is not None and made.col_mass is not None  # Asked for.
    mean = made.col_mass / is_token.sum(axis=1)[:, None, None]
    chosen = self.columns(mean)
    weights, values = columns.read(query, key, value, chosen, made.lse, options)
    part = jnp.einsum("BNTE,BNEH->BTNH", weights, values)
    mass = weights.sum(axis=-1).swapaxes(1, 2)
    return columns.calibrate(made.out, part, mass, self.beta), chosen

  def columns(self, mean: Float[Array, "B N S"]) -> Int[Array, "B N E"]:
    """Which columns are in S, -1 where there are fewer.

    Args:
      mean: Mean weight of each column.
    """
    num = min(math.ceil(1 / self.theta), mean.shape[-1])
    mean = jax.lax.stop_gradient(mean).at[..., 0].set(0.0)
    greatest, chosen = jax.lax.top_k(mean, num)
    is_sink = greatest > self.theta
    if self.heads:
      named = dotted.numbers("act: heads", self.heads)
      heads = jnp.isin(jnp.arange(mean.shape[1]), jnp.array(named))
      is_sink &= heads[None, :, None]
    return jnp.where(is_sink, chosen, -1)

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> hooks.KVCache:
    """Returns an empty cache, which keeps everything, and S of the prompt."""
    num = min(math.ceil(1 / self.theta), capacity)
    return act_cache.init(self, config, layer, batch_size, capacity, dtype, num)
