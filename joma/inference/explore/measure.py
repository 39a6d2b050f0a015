"""Attention of all heads to one text, of each query its largest weights.

Maps are looked at where they are made, layer by layer: no more than a few T x T
arrays are held, whatever the number of layers.

Letters: L layers, N query heads, K KV heads, T tokens, E keys of a query, P
policies, D tokens of a text that stands twice, B texts.
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from joma.inference.explore import recording
from joma.systems.probes import maps
from joma.transformer import model as models
from joma.transformer import probes
from joma.transformer.text import sizes
from scansnap_jax.experiment import errors

# Weights that are held of all heads and queries.
_NUM_ENTRIES = 2**24
_LEAST_ENTRIES = 8
# Of random tokens that stand twice: how many, and how many texts.
_PERIOD = 64
_NUM_REPEATED = 4


def attention(
    model: models.Transformer,
    params: PyTree,
    ids: Int[np.ndarray, "T"],
    left_at: Sequence[Int[np.ndarray, "L K T"]] = (),
) -> tuple[recording.Attention, Float[np.ndarray, "T"]]:
  """Reads a text with all keys.

  Args:
    model: A Transformer whose layers have attention weights.
    params: Its parameters.
    ids: Of the text.
    left_at: Of each policy, as in `recording.Evictions`.

  Returns:
    What is seen, and the loss of the token after each, NaN at the last.

  Raises:
    UserError: A layer has no attention weights, or they are no numbers.
  """
  config, num_tokens = model.config, len(ids)
  missing = np.flatnonzero(~probes.has_weights(config))
  if missing.size:
    raise errors.UserError(
        f"layer {missing[0]} has a mixer and no attention weights: there is"
        " nothing to look at."
    )
  size = sizes.window(num_tokens, config)
  num_heads = config.num_layers * config.num_heads
  num_entries = max(_NUM_ENTRIES // (num_heads * size), _LEAST_ENTRIES)
  groups = config.num_heads // config.num_kv_heads
  ends = np.full((len(left_at), config.num_layers, config.num_heads, size), 0)
  for policy, found in enumerate(left_at):
    ends[policy, :, :, :num_tokens] = found.repeat(groups, axis=1)
  seen, losses = _read(
      model,
      params,
      jnp.asarray(np.pad(ids, (0, size - num_tokens)))[None],
      jnp.int32(num_tokens),
      jnp.asarray(ends, jnp.int32),
      min(num_entries, size),
  )
  induction = prefix_matching(model, params)
  # Of equal weights the first come first: zeros of padding, behind the text.
  cut = lambda name: np.asarray(seen[name])[:, :, :num_tokens]
  entries = lambda name: cut(name)[..., :num_tokens]
  found = recording.Attention(
      keys=entries("keys"),
      weights=entries("weights"),
      totals=cut("totals"),
      received=cut("received"),
      shares=np.asarray(seen["shares"])[..., :num_tokens].swapaxes(0, 1),
      entropy=np.asarray(seen["entropy"]) / num_tokens,
      sink_mass=np.asarray(seen["sink_mass"]) / num_tokens,
      induction=induction,
  )
  if not np.isfinite(found.totals).all():
    raise errors.UserError(
        "attention weights are NaN or infinite: the model's weights or"
        " activations are too large for float32."
    )
  losses = np.array(losses[:num_tokens], np.float64)
  losses[-1] = np.nan
  return found, losses


@functools.partial(jax.jit, static_argnames=("model", "num_entries"))
def _read(
    model: models.Transformer,
    params: PyTree,
    tokens: Int[Array, "1 T"],
    length: Int[Array, ""],
    left_at: Int[Array, "P L N T"],
    num_entries: int,
) -> tuple[dict[str, Array], Float[Array, "T"]]:
  """Looks at every layer; what is behind the length is padding."""
  steps = jnp.arange(tokens.shape[1])
  positions = jnp.where(steps < length, steps, -1)[None]
  logits, seen = model.apply(
      {"params": params}, tokens, positions=positions, mutable="intermediates"
  )
  is_query = (steps < length)[None, None, :, None]
  layers = []
  for layer in range(model.config.num_layers):
    weights = probes.weights_of(seen, layer, model.config, tokens.shape)
    weights = jnp.where(is_query, weights, 0.0)
    layers.append(_of_layer(weights, left_at[:, layer], num_entries))
  targets = jnp.roll(tokens[0], -1)
  log_probs = jax.nn.log_softmax(logits[0])
  losses = -jnp.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0]
  return jax.tree.map(lambda *x: jnp.stack(x), *layers), losses


def _of_layer(
    weights: Float[Array, "1 N T T"],
    left_at: Int[Array, "P N T"],
    num_entries: int,
) -> dict[str, Array]:
  """What is held of a layer's maps, sums over queries."""
  visible = probes.count_visible(weights.shape[2])
  measured = probes.attention(weights, visible)
  weights = weights[0].astype(jnp.float32)
  largest, keys = jax.lax.top_k(weights, num_entries)
  queries = jnp.arange(weights.shape[1])[None, :, None]
  shares = [
      jnp.where(ends[:, None] > queries, weights, 0.0).sum(axis=-1)
      for ends in left_at
  ]
  totals = weights.sum(axis=-1)
  return {
      "keys": keys.astype(jnp.uint16),
      "weights": largest,
      "totals": totals,
      "received": weights.sum(axis=1),
      "shares": (
          jnp.stack(shares) / jnp.maximum(totals, 1e-30)[None]
          if shares
          else jnp.zeros((0, *totals.shape))
      ),
      "entropy": measured.entropy[0].sum(axis=-1),
      "sink_mass": measured.sink_mass[0].sum(axis=-1),
  }


def prefix_matching(
    model: models.Transformer, params: PyTree, seed: int = 0
) -> Float[np.ndarray, "L N"]:
  """The score of induction heads: `maps.prefix_matching` on random tokens.

  Args:
    model: A Transformer.
    params: Its parameters.
    seed: Of the tokens, D = 64 that stand twice where positions reach so far.
  """
  config, period = model.config, _PERIOD
  if config.positions == "learned":
    period = min(period, config.max_len // 2)
  if period < 2:
    return np.zeros((config.num_layers, config.num_heads))
  rng = np.random.default_rng(seed)
  draw = lambda: rng.choice(
      config.vocab_size, period, replace=config.vocab_size < period
  )
  once = np.stack([draw() for _ in range(_NUM_REPEATED)])
  twice = jnp.asarray(np.concatenate([once, once], axis=1), jnp.int32)
  return np.asarray(_read_twice(model, params, twice))


@functools.partial(jax.jit, static_argnames="model")
def _read_twice(
    model: models.Transformer, params: PyTree, tokens: Int[Array, "B T"]
) -> Float[Array, "L N"]:
  _, seen = model.apply({"params": params}, tokens, mutable="intermediates")
  found = [
      maps.prefix_matching(
          probes.weights_of(seen, layer, model.config, tokens.shape)
      ).mean(axis=0)
      for layer in range(model.config.num_layers)
  ]
  return jnp.stack(found)
