"""Causal self-attention of a Transformer: projections, positions, one op.

  attn_logits  = soft_cap(scale query key^T), -inf where the mask forbids
  attn_weights = softmax(attn_logits)
  out          = (attn_weights value) W_out

Keys and values have K heads, of which N / K query heads share each: K = N is
multi-head attention, K = 1 multi-query attention (arXiv 1911.02150), between
them grouped-query attention (arXiv 2305.13245). The op is `kernels_pallas`'s.
What else a layer may do with any of it are its `hooks`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import layer_hooks
from joma.transformer import mlp
from joma.transformer import norm
from joma.transformer import routing
from joma.transformer import sharding
from joma.transformer.layers import monarch
from joma.transformer.rope import rotary
from joma.transformer.weighing import in_parts
from joma.transformer.weighing import rows
from joma.transformer.weighing import rule as rules
from kernels_pallas import implementations
from kernels_pallas import masks


class Attention(nn.Module):
  """Self-attention of one layer.

  Sows `attn_logits` and `attn_weights` [B, N, T, S], float32, and `head_out`
  [B, T, N, H], the heads' outputs before the output projection; the first two
  only where there is no cache. `attn_shares` are the weights of a rule whose
  rows need not sum to 1, divided so that they do.

  Attributes:
    config: The model's.
    layer: Which layer, from 0.
    dtype: Of the products; softmax is float32.
    implementation: Of the op.
  """

  config: configs.TransformerConfig
  layer: int
  dtype: jax.typing.DTypeLike = jnp.float32
  implementation: implementations.Implementation | None = None

  @nn.compact
  def __call__(
      self,
      x: Float[Array, "B T D"],
      positions: Int[Array, "B T"],
      mask: masks.Mask,
      kv_cache: PyTree = None,
      is_training: bool = False,
      carry: Mapping[str, Any] | None = None,
      route: routing.Route | None = None,
  ) -> tuple[Float[Array, "B T D"], Any, Mapping[str, Any]]:
    """Returns what is added to the residual stream, the cache, and the carry.

    Args:
      x: Normalized residual stream.
      positions: Of the tokens, for rotary positions and the cache.
      mask: Which tokens see which, windows aside; unused with a cache.
      kv_cache: A KVCache; None attends among the tokens given.
      is_training: Whether attention weights are dropped.
      carry: What earlier layers handed on to this one, by its maker's name.
      route: A router's way through this layer.
    """
    if route is not None:
      kv_cache = route.heads(x, kv_cache)
    carry = {} if carry is None else carry
    own = layer_hooks.of_layer(self.config, self.layer)
    call = self._call(own, x, positions, carry, is_training, kv_cache)
    read = (x, x, x)
    if own.read is not None and not own.takes(self.config, self.layer):
      read = own.read.read(call.params[own.read.name], call)
    query, key, value = self._project(read, route, self._taken(own, call))
    if own.share is not None:
      handed = {**call.carry, own.share.name: (query, key)}
      call = dataclasses.replace(call, carry=handed)
    if own.prepare:
      query, key, value, kv_cache = layer_hooks.prepare(
          own.prepare, call, query, key, value, kv_cache
      )
    # Positions are turned in there: caches that keep raw keys turn them anew.
    made, kv_cache = self._mix(own, call, query, key, value, mask, kv_cache)
    if own.gate is not None:
      params = call.params[own.gate.name]
      seen = dataclasses.replace(call, made=made)
      head_out, losses = own.gate.gate(params, seen, made.head_out)
      made = dataclasses.replace(made, head_out=head_out)
      self._add_losses(own.gate, losses)
    counts = self.is_mutable_collection("losses") and not call.has_cache
    if own.losses is not None and counts:
      params = call.params[own.losses.name]
      self._add_losses(own.losses, own.losses.losses(params, call, made))
    self.sow("intermediates", "head_out", made.head_out)
    out = self._product(self._dense_out(), made.head_out, route)
    return out, kv_cache, self._hand_on(own, call, made)

  def _add_losses(
      self, system: hooks.System, losses: Mapping[str, Array]
  ) -> None:
    for name, loss in losses.items():
      self.sow("losses", f"{system.name}_{name}", loss)

  def _taken(
      self, own: layer_hooks.LayerSystems, call: hooks.Call
  ) -> tuple[Array, Array] | None:
    """Queries and keys of an earlier layer; None where it makes its own."""
    if own.share is None or not own.takes(self.config, self.layer):
      return None
    return call.carry[own.share.name]

  def _project(
      self,
      read: tuple[Array, Array, Array],
      route: routing.Route | None,
      taken: tuple[Array, Array] | None,
  ) -> tuple[Array, Array, Array]:
    config = self.config
    dense = lambda name, x, num_heads: self._product(
        mlp.projection(
            config,
            (num_heads, config.head_dim),
            name,
            use_bias=config.use_qkv_bias,
            dtype=self.dtype,
        ),
        x,
        route,
    )
    if taken is not None:
      return *taken, dense("value", read[2], config.num_kv_heads)
    query = dense("query", read[0], config.num_heads)
    key = dense("key", read[1], config.num_kv_heads)
    if config.use_qk_norm:
      normalize = lambda name: norm.Norm(
          "rms_norm",
          config.norm_epsilon,
          config.norm_scale_offset,
          self.dtype,
          name=name,
      )
      query, key = normalize("query_norm")(query), normalize("key_norm")(key)
    return query, key, dense("value", read[2], config.num_kv_heads)

  def _dense_out(self) -> nn.Module:
    return mlp.projection(
        self.config,
        (self.config.embed_dim,),
        "out",
        use_bias=self.config.use_attn_out_bias,
        dtype=self.dtype,
        num_axes=2,
        into_residual=True,
    )

  def _product(
      self, dense: nn.Module, x: Array, route: routing.Route | None
  ) -> Array:
    return dense(x) if route is None else route.product(dense, x)

  def _call(
      self,
      own: layer_hooks.LayerSystems,
      x: Float[Array, "B T D"],
      positions: Int[Array, "B T"],
      carry: Mapping[str, PyTree],
      is_training: bool,
      kv_cache: PyTree,
  ) -> hooks.Call:
    """What the systems see; draws their parameters when a model is made."""
    make = lambda system: self.param(
        system.name, system.init_params, self.config, self.layer
    )
    takes = own.takes(self.config, self.layer)
    has_params = lambda system: not (
        takes and system is own.read
    ) and layer_hooks.has_params(system, self.config, self.layer)
    params = {
        system.name: make(system) if has_params(system) else {}
        for system in own.systems
    }
    call = hooks.Call(
        config=self.config,
        layer=self.layer,
        x=x,
        positions=positions,
        rotate=self._rotate(),
        options=self._options(kv_cache is not None),
        params=params,
        carry=carry,
        is_training=is_training,
        has_cache=kv_cache is not None,
    )
    return layer_hooks.with_weights(own, call)

  def _mix(
      self,
      own: layer_hooks.LayerSystems,
      call: hooks.Call,
      query: Float[Array, "#B T N H"],
      key: Float[Array, "#B S K H"],
      value: Float[Array, "B S K H"],
      mask: masks.Mask,
      kv_cache: PyTree,
  ) -> tuple[hooks.Made, PyTree]:
    """The heads' outputs: of a cache, of a mixer, or of attention."""
    options, rotate, where = call.options, call.rotate, None
    knows_texts = own.mixer is not None or own.select is not None
    if kv_cache is not None or knows_texts or len(query) != len(key):
      # These know each text by itself; or one of the two differs by text.
      shape = (len(value), *query.shape[1:])
      query = jnp.broadcast_to(query, shape)
      key = jnp.broadcast_to(key, value.shape)
    if kv_cache is not None:
      head_out, kv_cache = layer_hooks.attend(
          own, call, query, key, value, kv_cache
      )
      heads = self.config.num_kv_heads
      kv_cache = sharding.keep_cache(kv_cache, len(value), heads)
    elif own.mixer is not None:
      params = call.params[own.mixer.name]
      head_out = own.mixer.mix(params, call, query, key, value, mask)
    else:
      where = with_window(mask, query.shape[1], options.window)
      places = _places(call, query)
      query, key = rotate(query, places), rotate(key, places)
      # After rotation: a selector scores keys as attention will.
      if own.select is not None:
        params = call.params[own.select.name]
        where = own.select.select(params, call, query, key, where)
      head_out = self._attend(query, key, value, where, call)
    made = hooks.Made(
        query=query,
        key=key,
        value=value,
        where=where,
        head_out=head_out,
        options=options,
        kv_cache=kv_cache,
    )
    return made, kv_cache

  def _hand_on(
      self, own: layer_hooks.LayerSystems, call: hooks.Call, made: hooks.Made
  ) -> Mapping[str, PyTree]:
    """Lets a probe look, and adds what later layers get to the carry."""
    probe = own.probe
    if probe is not None and self.is_mutable_collection("intermediates"):
      found = probe.probe(call.params[probe.name], call, made)
      for name, values in found.items():
        self.sow("intermediates", f"{probe.name}_{name}", values)
    if own.carry is None:
      return call.carry
    name = own.carry.name
    handed = own.carry.carry(call.params[name], call, made)
    return {**call.carry, name: handed}

  def _options(self, has_cache: bool) -> hooks.AttentionOptions:
    config, kernel = self.config, None
    if has_cache and self.has_variable("params", "out"):
      kernel = monarch.kernel_of(self.get_variable("params", "out"))
      kernel = kernel.reshape(config.num_heads, config.head_dim, -1)
    scale = config.attn_scale
    return hooks.AttentionOptions(
        scale=config.head_dim**-0.5 if scale is None else scale,
        logits_soft_cap=config.attn_logits_soft_cap,
        window=config.window_of(self.layer),
        implementation=self.implementation,
        out_kernel=kernel,
    )

  def _rotate(self) -> hooks.Rotate:
    """Rotary positions; some kinds turn by the longest text of the call."""
    config = self.config
    if config.positions != "rotary":
      return lambda x, positions: x
    kind = config.rope_of(self.layer)
    return lambda x, positions: rotary.rotate_by(x, positions, kind, config)

  def _attend(
      self,
      query: Float[Array, "#B T N H"],
      key: Float[Array, "#B S K H"],
      value: Float[Array, "B S K H"],
      where: hooks.Where,
      call: hooks.Call,
  ) -> Float[Array, "B T N H"]:
    options, places = call.options, (_places(call, query),) * 2
    if self.is_mutable_collection("intermediates"):
      attn_logits = rows.masked_logits(query, key, where, options, places)
      self.sow("intermediates", "attn_logits", attn_logits)
      weights, _ = rows.of_logits(attn_logits, query, options)
      self.sow("intermediates", "attn_weights", weights)
      if options.weights is not None and options.weights.normalize is not None:
        # Such rows may sum to anything: shares are what can be compared.
        self.sow("intermediates", "attn_shares", rules.shares(weights))
    if call.is_training and self.config.attn_dropout:
      drop = nn.Dropout(self.config.attn_dropout, deterministic=False)
      return rows.attend_at_once(
          query, key, value, where, options, places, drop
      )
    rule = options.weights
    is_softmax = rule is None or rule.is_softmax
    if rule is not None and not is_softmax:
      layer_hooks.check_implementation(rule, options.implementation)
    if not is_softmax or len(query) < len(value):
      return rows.attend(query, key, value, where, options, places)
    return in_parts.attend(query, key, value, where, options).out


def _places(
    call: hooks.Call, query: Float[Array, "#B T N H"]
) -> Int[Array, "#B T"]:
  """Positions of queries; those that all texts share stand at 0, 1, ..."""
  if len(query) == len(call.positions):
    return call.positions
  return jnp.arange(query.shape[1])[None]


def with_window(
    mask: masks.Mask, seq_len: int, window: int | None
) -> masks.Mask:
  """Leaves of a mask over [T, T] the last `window` keys of each query."""
  if window is None or window >= seq_len:
    return mask
  return mask & masks.sliding_window(seq_len, seq_len, window=window)
