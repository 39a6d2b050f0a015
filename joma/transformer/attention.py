"""Causal self-attention of a Transformer: projections, positions, one op.

  attn_logits  = soft_cap(scale query key^T), -inf where the mask forbids
  attn_weights = softmax(attn_logits)
  out          = (attn_weights value) W_out

Keys and values have K heads, of which N / K query heads share each: K = N is
multi-head attention, K = 1 multi-query attention (arXiv 1911.02150), between
them grouped-query attention (arXiv 2305.13245). The op is `kernels_pallas`'s.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.transformer import config as configs
from joma.transformer import mlp
from joma.transformer import norm
from joma.transformer import sharding
from joma.transformer.rope import rotary
from kernels_pallas import implementations
from kernels_pallas import masks
from kernels_pallas.flash_attention import api

Rotate = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
  """What attention needs besides arrays; static.

  Attributes:
    scale: Factor of the logits.
    logits_soft_cap: c in c tanh(logits / c); None is off.
    window: Keys that a query sees, its own included; None is all.
    implementation: Of the op, see `kernels_pallas.implementations`.
  """

  scale: float
  logits_soft_cap: float | None = None
  window: int | None = None
  implementation: implementations.Implementation | None = None


class KVCache(Protocol):
  """Keys and values of one layer: what it keeps and what queries see of it."""

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: Rotate,
      options: AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "KVCache"]:
    """Takes in new tokens and attends from them.

    Args:
      query: Not rotated yet.
      key: Not rotated yet: a cache may keep keys before or after rotation.
      value: Of the same tokens.
      positions: In the sequence, from 0; -1 marks padding, which is not kept.
      rotate: Applies rotary positions; does nothing where there are none.
      options: Static.

    Returns:
      (out, cache). Rows of padding are arbitrary.
    """
    ...


class Attention(nn.Module):
  """Self-attention of one layer.

  Sows `attn_logits` and `attn_weights` [B, N, T, S], float32, and `head_out`
  [B, T, N, H], the heads' outputs before the output projection; the first two
  only where there is no cache.

  Attributes:
    config: The model's.
    layer: Which layer, from 0.
    dtype: Of the products; softmax is float32.
    implementation: Of the op.
  """

  config: configs.TransformerConfig
  layer: int
  dtype: Any = jnp.float32
  implementation: implementations.Implementation | None = None

  @nn.compact
  def __call__(
      self,
      x: Float[Array, "B T D"],
      positions: Int[Array, "B T"],
      mask: masks.Mask,
      kv_cache: Any = None,
      is_training: bool = False,
  ) -> tuple[Float[Array, "B T D"], Any]:
    """Returns what is added to the residual stream, and the cache.

    Args:
      x: Normalized residual stream.
      positions: Of the tokens, for rotary positions and the cache.
      mask: Which tokens see which, windows aside; unused with a cache.
      kv_cache: A KVCache; None attends among the tokens given.
      is_training: Whether attention weights are dropped.
    """
    query, key, value = self._project(x)
    rotate, options = self._rotate(), self._options()
    if kv_cache is not None:
      head_out, kv_cache = kv_cache.attend(
          query, key, value, positions, rotate, options
      )
    else:
      mask = with_window(mask, x.shape[1], options.window)
      query, key = rotate(query, positions), rotate(key, positions)
      head_out = self._attend(query, key, value, mask, options, is_training)
    self.sow("intermediates", "head_out", head_out)
    out = nn.DenseGeneral(
        self.config.embed_dim,
        axis=(-2, -1),
        use_bias=self.config.use_attn_out_bias,
        dtype=self.dtype,
        kernel_init=mlp.kernel_init(self.config, into_residual=True),
        name="out",
    )(head_out)
    return out, kv_cache

  def _project(self, x: Array) -> tuple[Array, Array, Array]:
    config = self.config
    dense = lambda name, num_heads: nn.DenseGeneral(
        (num_heads, config.head_dim),
        use_bias=config.use_qkv_bias,
        dtype=self.dtype,
        kernel_init=mlp.kernel_init(config),
        name=name,
    )(x)
    query = dense("query", config.num_heads)
    key = dense("key", config.num_kv_heads)
    if config.use_qk_norm:
      normalize = lambda name: norm.Norm(
          "rms_norm",
          config.norm_epsilon,
          config.norm_scale_offset,
          self.dtype,
          name=name,
      )
      query, key = normalize("query_norm")(query), normalize("key_norm")(key)
    return query, key, dense("value", config.num_kv_heads)

  def _options(self) -> AttentionOptions:
    config = self.config
    scale = config.attn_scale
    return AttentionOptions(
        scale=config.head_dim**-0.5 if scale is None else scale,
        logits_soft_cap=config.attn_logits_soft_cap,
        window=config.window_of(self.layer),
        implementation=self.implementation,
    )

  def _rotate(self) -> Rotate:
    """Rotary positions; some kinds turn by the longest text of the call."""
    config = self.config
    if config.positions != "rotary":
      return lambda x, positions: x
    kind = config.rope_of(self.layer)
    return lambda x, positions: rotary.rotate_by(x, positions, kind, config)

  def _attend(self, query, key, value, mask, options, is_training) -> Array:
    if self.is_mutable_collection("intermediates"):
      attn_logits = masked_logits(query, key, mask, options)
      self.sow("intermediates", "attn_logits", attn_logits)
      self.sow("intermediates", "attn_weights", jax.nn.softmax(attn_logits))
    if is_training and self.config.attn_dropout:
      attn_weights = jax.nn.softmax(masked_logits(query, key, mask, options))
      dropout = nn.Dropout(self.config.attn_dropout, deterministic=False)
      return _weighted_values(dropout(attn_weights), value)
    attend = lambda query, key, value, mask: api.flash_attention(
        query,
        key,
        value,
        mask=mask,
        scale=options.scale,
        logits_soft_cap=options.logits_soft_cap,
        implementation=options.implementation,
    ).out
    return sharding.per_part(attend, query, key, value, mask)


def with_window(
    mask: masks.Mask, seq_len: int, window: int | None
) -> masks.Mask:
  """Leaves of a mask over [T, T] the last `window` keys of each query."""
  if window is None or window >= seq_len:
    return mask
  return mask & masks.sliding_window(seq_len, seq_len, window=window)


def masked_logits(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    mask: masks.Mask,
    options: AttentionOptions,
) -> Float[Array, "B N T S"]:
  """Attention logits as one array, float32: to look at, or to drop from."""
  batch, num_queries, num_heads, head_dim = query.shape
  num_keys, num_kv_heads = key.shape[1:3]
  query = query.reshape(batch, num_queries, num_kv_heads, -1, head_dim)
  attn_logits = options.scale * jnp.einsum(
      "BTKGH,BSKH->BKGTS", query, key, preferred_element_type=jnp.float32
  )
  if options.logits_soft_cap is not None:
    cap = options.logits_soft_cap
    attn_logits = cap * jnp.tanh(attn_logits / cap)
  attn_logits = attn_logits.reshape(batch, num_heads, num_queries, num_keys)
  allowed = jnp.asarray(masks.allowed(mask, num_keys))
  allowed = allowed[:, None] if allowed.ndim == 3 else allowed[None, None]
  return jnp.where(allowed, attn_logits, -jnp.inf)


def _weighted_values(
    attn_weights: Float[Array, "B N T S"], value: Float[Array, "B S K H"]
) -> Float[Array, "B T N H"]:
  batch, num_heads, num_queries, num_keys = attn_weights.shape
  num_kv_heads, head_dim = value.shape[2:]
  grouped = attn_weights.astype(value.dtype).reshape(
      batch, num_kv_heads, -1, num_queries, num_keys
  )
  out = jnp.einsum("BKGTS,BSKH->BTKGH", grouped, value)
  return out.reshape(batch, num_queries, num_heads, head_dim)
