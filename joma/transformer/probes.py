"""What is read off a Transformer: how sparse attention is, and MLP ranks.

Figure 7 of JoMA (https://arxiv.org/abs/2310.00535) follows attention sparsity
and the stable rank of the lower MLP layer over checkpoints of real models. Of
one query's weights a_1, a_2, ..., of which v may be above zero:

  entropy            -sum_s a_s ln a_s, from 0 to ln v
  effective support  exp(entropy), from 1 to v: how many keys it attends to
  top mass           sum of its ceil(v / 5) largest weights; 1 is all attention
                     on the best fifth of what it sees
  negligible         share of the v weights that are below 1 % of the largest,
                     the measure of H2O (https://arxiv.org/abs/2306.14048)
  sink mass          a_1, the weight of the first token, where attention goes
                     that has nothing to look for
                     (https://arxiv.org/abs/2309.17453)

All of it is computed where the weights are made, layer by layer: `read` never
holds more than a few T x S maps, whatever the number of layers.

Letters: B batch, T queries, S keys, N heads, L layers, D width, F hidden width,
V vocabulary.
"""

from collections.abc import Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np

from joma.systems.probes import maps
from joma.systems.probes import read as named
from joma.theory import metrics
from joma.transformer import config as configs
from joma.transformer import layer_hooks
from joma.transformer import model as models
from joma.transformer.layers import monarch

TOP_SHARE = 0.2
NEGLIGIBLE = 0.01
# A head is a sink when the first token has more than this of its attention.
SINK_THRESHOLD = 0.3


class Attention(NamedTuple):
  """The five measures of the module: of queries, or summed or mean over them.

  Attributes:
    entropy: In nats.
    effective_support: In keys.
    top_mass: From 0 to 1.
    negligible: From 0 to 1.
    sink_mass: From 0 to 1.
  """

  entropy: Float[Array, "*b"]
  effective_support: Float[Array, "*b"]
  top_mass: Float[Array, "*b"]
  negligible: Float[Array, "*b"]
  sink_mass: Float[Array, "*b"]


def attention(
    attn_weights: Float[Array, "B N T S"], num_visible: Int[Array, "T"]
) -> Attention:
  """Measures every query, each result [B, N, T].

  Args:
    attn_weights: Rows that sum to 1, 0 where the mask forbids.
    num_visible: v, keys that the mask allows; see `count_visible`.
  """
  attn_weights = attn_weights.astype(jnp.float32)
  # Where weights are no numbers, counts of them are none either.
  none = jnp.where(jnp.isnan(attn_weights[..., 0]), jnp.nan, 0)
  entropy = jax.scipy.special.entr(attn_weights).sum(axis=-1)
  num_top = jnp.ceil(TOP_SHARE * num_visible).astype(jnp.int32)
  largest = attn_weights.max(axis=-1, keepdims=True)
  # Keys that are not visible have weight 0 and are counted out again.
  num_keys = attn_weights.shape[-1]
  small = (attn_weights < NEGLIGIBLE * largest).sum(axis=-1)
  visible = num_visible[None, None]
  return Attention(
      entropy=entropy,
      effective_support=jnp.exp(entropy),
      top_mass=top_mass(attn_weights, num_top[None, None]) + none,
      negligible=(small - (num_keys - visible)) / visible + none,
      sink_mass=attn_weights[..., 0],
  )


def uniform(num_visible: Int[Array, "T"]) -> Attention:
  """What attention to all visible keys alike measures, each result [T].

  The first key counts as visible, which it is without a window.
  """
  visible = num_visible.astype(jnp.float32)
  return Attention(
      entropy=jnp.log(visible),
      effective_support=visible,
      top_mass=jnp.ceil(TOP_SHARE * num_visible) / visible,
      negligible=jnp.zeros_like(visible),
      sink_mass=1 / visible,
  )


def count_visible(seq_len: int, window: int | None = None) -> Int[Array, "T"]:
  """Keys that each query sees under a causal mask, its own included."""
  return jnp.minimum(jnp.arange(1, seq_len + 1), window or seq_len)


def top_mass(
    values: Float[Array, "*b S"], num_top: Int[Array, "*#b"]
) -> Float[Array, "*b"]:
  """Sums the `num_top` >= 1 largest of each row of non-negative numbers.

  Exact, and many times faster than sorting: the threshold is found bit by bit,
  as the bits of non-negative floats, read as integers, have their order.
  """
  bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)

  def set_bit(i: Array, threshold: Array) -> Array:
    trial = threshold | (1 << (30 - i))
    num_above = (bits >= trial[..., None]).sum(axis=-1)
    return jnp.where(num_above >= num_top, trial, threshold)

  threshold = jnp.zeros(values.shape[:-1], jnp.int32)
  threshold = jax.lax.fori_loop(0, 31, set_bit, threshold)
  is_above = bits > threshold[..., None]
  at_threshold = jax.lax.bitcast_convert_type(threshold, jnp.float32)
  num_equal = num_top - is_above.sum(axis=-1)
  return jnp.where(is_above, values, 0).sum(axis=-1) + at_threshold * num_equal


class Reading(NamedTuple):
  """One batch, as sums over its tokens: add them, then divide by `num_tokens`.

  Attributes:
    attention: Of each layer and head, leaves [L, N].
    num_tokens: Tokens that are no padding.
    loss: Cross-entropy in nats, summed over `num_targets`.
    num_targets: Tokens that follow another.
    logits: Of every position; None unless asked for.
    named: What probes give that are asked for by name.
  """

  attention: Attention
  num_tokens: Float[Array, ""]
  loss: Float[Array, ""]
  num_targets: Float[Array, ""]
  logits: Float[Array, "B T V"] | None
  named: named.TextSums


@functools.partial(jax.jit, static_argnames=("model", "with_logits", "names"))
def read(
    model: models.Transformer,
    params: PyTree,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    with_logits: bool = False,
    names: tuple[str, ...] = (),
) -> Reading:
  """Reads texts and measures every layer.

  Args:
    model: Static.
    params: Its parameters.
    tokens: Each in [0, V), padded at their ends.
    lengths: Tokens of each text, from 0 to T.
    with_logits: Whether to return the logits too; static.
    names: Probes of `systems.probes.names`, but for those of updates; static.
  """
  steps = jnp.arange(tokens.shape[1])[None]
  is_token = steps < lengths[:, None]
  positions = jnp.where(is_token, steps, -1)
  logits, seen = model.apply(
      {"params": params}, tokens, positions=positions, mutable="intermediates"
  )
  weights = is_token.astype(jnp.float32)
  found = []
  for layer in range(model.config.num_layers):
    attn_weights = weights_of(seen, layer, model.config, tokens.shape)
    num_visible = count_visible(tokens.shape[1], model.config.window_of(layer))
    found.append(
        jax.tree.map(
            lambda rows: jnp.einsum("BNT,BT->N", rows, weights),
            attention(attn_weights, num_visible),
        )
    )
  log_probs = jax.nn.log_softmax(logits[:, :-1])
  picked = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)
  return Reading(
      attention=jax.tree.map(lambda *layers: jnp.stack(layers), *found),
      num_tokens=weights.sum(),
      loss=-(picked[..., 0] * weights[:, 1:]).sum(),
      num_targets=weights[:, 1:].sum(),
      logits=logits if with_logits else None,
      named=by_name(names, seen, model.config, is_token),
  )


def by_name(
    names: tuple[str, ...],
    seen: Mapping[str, Any],
    config: configs.TransformerConfig,
    is_token: Bool[Array, "B T"],
) -> named.TextSums:
  """Sums probes over texts.

  Args:
    names: Of `systems.probes.names`, but for those of updates.
    seen: What a Transformer has sown.
    config: The model's.
    is_token: Which positions are no padding.
  """
  return named.text_sums(
      names,
      [
          weights_of(seen, layer, config, is_token.shape)
          for layer in range(config.num_layers)
      ],
      stream_of(seen, config),
      is_token,
      has_weights(config).tolist(),
  )


def stream_of(
    seen: Mapping[str, Any], config: configs.TransformerConfig
) -> Float[Array, "B M T D"]:
  """The residual stream before each layer and after the last, M = L + 1."""
  sown = seen["intermediates"]
  resid = [sown["resid_embed"][0]]
  resid += [
      sown[f"layers_{layer}"]["resid_mlp"][0]
      for layer in range(config.num_layers)
  ]
  return jnp.stack(resid, axis=1)


def weights_of(
    seen: Mapping[str, Any],
    layer: int,
    config: configs.TransformerConfig,
    shape: tuple[int, ...],
) -> Float[Array, "B N T T"]:
  """Attention weights of a layer; zeros where its mixer has none.

  Those of a rule whose rows need not sum to 1 are divided so that they do.

  Args:
    seen: What a Transformer has sown.
    layer: Which, from 0.
    config: The model's.
    shape: Of the tokens, (B, T).
  """
  attn: Any = seen["intermediates"][f"layers_{layer}"]["attn"]
  for name in ("attn_shares", "attn_weights"):
    if name in attn:
      return attn[name][0]
  batch, length = shape
  return jnp.zeros((batch, config.num_heads, length, length))


def has_weights(config: configs.TransformerConfig) -> Bool[np.ndarray, "L"]:
  """Which layers have attention weights: those without a mixer."""
  layers = range(config.num_layers)
  return np.array(
      [layer_hooks.of_layer(config, layer).mixer is None for layer in layers]
  )


def marked(
    values: Float[np.ndarray, "L *v"], config: configs.TransformerConfig
) -> Float[np.ndarray, "L *v"]:
  """Puts NaN where a layer has no attention weights.

  This is done on the host: a NaN in an array of a device is a fault, and is
  taken for one under JAX_DEBUG_NANS.
  """
  values = np.asarray(values)
  is_known = has_weights(config).reshape(-1, *(1,) * (values.ndim - 1))
  return np.where(is_known, values, np.nan)


def marked_by_name(
    means: Mapping[str, Float[np.ndarray, "L *v"]],
    config: configs.TransformerConfig,
) -> dict[str, Float[np.ndarray, "L *v"]]:
  """Does so with what `named.means` gives of attention weights."""
  return {
      name: marked(values, config) if name in maps.PROBES else values
      for name, values in means.items()
  }


def sink_rate(sink_mass: Float[np.ndarray, "*b N"]) -> Float[np.ndarray, "*b"]:
  """Share of heads whose mean sink mass exceeds `SINK_THRESHOLD`.

  NaN where a layer has no attention weights.
  """
  share = (sink_mass > SINK_THRESHOLD).mean(axis=-1)
  return np.where(np.isnan(sink_mass).any(axis=-1), np.nan, share)


def stable_ranks(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Measures ||W||_F^2 / ||W||_2^2 of every MLP matrix, by its name, each [L].

  Args:
    params: Of a Transformer.

  Returns:
    Of `up` and `down`, and of `gate` where the MLP has one. The lower layer
    that JoMA speaks of is `up`, and `gate` beside it.
  """
  num_layers = sum(name.startswith("layers_") for name in params)
  layers = [params[f"layers_{layer}"]["mlp"] for layer in range(num_layers)]
  rank = lambda kernel: float(_stable_rank(kernel.astype(jnp.float32)))
  kernel = monarch.kernel_of
  return {
      name: np.array([rank(kernel(layer[name])) for layer in layers])
      for name in sorted(layers[0])
  }


_stable_rank = jax.jit(metrics.stable_rank)
