"""Runs a cache policy on a text and notes when it lets go of each token.

The text is given, so that all policies read the same tokens. A policy's cache
is `evaluate_cache`'s, and what it keeps are the positions that the cache itself
tells.

Letters: L layers, K KV heads, T tokens, C slots.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree
import numpy as np

from joma.inference.evaluation import evaluate
from joma.inference.evaluation import evaluate_caches
from joma.inference.evaluation import evaluate_config
from joma.inference.explore import recording
from joma.systems.cache_policies import names as policy_names
from joma.transformer import layer_hooks
from joma.transformer import model as models
from scansnap_jax.experiment import errors

# Steps between two remarks on how far a policy has read.
_NUM_STEPS = 64


def caches_of(
    model: models.Transformer,
    name: str,
    slots: int,
    num_tokens: int,
    evaluation: evaluate_config.EvaluateConfig | None = None,
) -> tuple[Any, ...]:
  """Returns empty caches of a policy, for one text.

  Args:
    model: A Transformer.
    name: As `policy_names.parse` takes it.
    slots: Of a KV head.
    num_tokens: Of the text, at least 2.
    evaluation: How an evaluation makes them; None is by default.

  Raises:
    UserError: The policy does not fit so few slots, or a layer's cache cannot
      tell which tokens it has.
  """
  config = evaluation or evaluate_config.EvaluateConfig(
      length=num_tokens, batch_size=1
  )
  caches = evaluate_caches.make(config, model.config, name, slots, 1)
  for layer, cache in enumerate(caches):
    if not isinstance(layer_hooks.inner(cache), evaluate.KnowsPositions):
      raise errors.UserError(
          f"policies={name}: the cache of layer {layer} keeps a state and no"
          " tokens, of which none could be seen to leave."
      )
  return caches


def record(
    model: models.Transformer,
    params: PyTree,
    ids: Int[np.ndarray, "T"],
    name: str,
    slots: int,
    num_prompt: int = 0,
    on_progress: Callable[[int], None] = lambda num_tokens: None,
    evaluation: evaluate_config.EvaluateConfig | None = None,
) -> recording.Evictions:
  """Reads a text with a policy's cache.

  Args:
    model: A Transformer.
    params: Its parameters.
    ids: Of the text, at least 2.
    name: Of the policy, as `policy_names.parse` takes it.
    slots: Of a KV head.
    num_prompt: Tokens that are read at once; the others come one by one.
    on_progress: Told how many tokens have been read since.
    evaluation: As in `caches_of`.

  Raises:
    UserError: As `caches_of`; or the logits of a token are no numbers.
  """
  num_tokens = len(ids)
  caches = caches_of(model, name, slots, num_tokens, evaluation)
  shape = (model.config.num_layers, model.config.num_kv_heads, num_tokens)
  left_at = jnp.full(shape, num_tokens, jnp.int32)
  losses = jnp.zeros(num_tokens)
  tokens = jnp.asarray(ids, jnp.int32)
  if num_prompt:
    prompt, length = tokens[None, :num_prompt], np.array([num_prompt])
    _, caches = evaluate.read_at_once(model, params, prompt, length, caches)
    left_at = _left(left_at, caches, jnp.int32(num_prompt), num_tokens)
    on_progress(num_prompt)
  for start in range(num_prompt, num_tokens, _NUM_STEPS):
    stop = min(start + _NUM_STEPS, num_tokens)
    caches, left_at, losses = _read(
        model,
        params,
        tokens,
        np.int32(start),
        np.int32(stop),
        (caches, left_at, losses),
    )
    jax.block_until_ready(losses)
    on_progress(stop - start)
  losses = np.array(losses, np.float64)
  if not np.isfinite(losses).all():
    raise errors.UserError(
        f"policies={name}: the logits of token"
        f" {int(np.argmin(np.isfinite(losses)))} are no numbers."
    )
  losses[:num_prompt] = losses[-1] = np.nan
  return recording.Evictions(
      name, policy_names.label(name), slots, np.asarray(left_at), losses
  )


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def _read(
    model: models.Transformer,
    params: PyTree,
    tokens: Int[Array, "T"],
    start: Int[Array, ""],
    stop: Int[Array, ""],
    state: Any,
) -> Any:
  """Takes tokens in one by one."""

  def step(time: Any, state: Any) -> Any:
    caches, left_at, losses = state
    logits, caches = model.apply(
        {"params": params},
        tokens[time][None, None],
        positions=jnp.full((1, 1), time),
        kv_cache=caches,
    )
    target = tokens[jnp.minimum(time + 1, len(tokens) - 1)]
    loss = -jax.nn.log_softmax(logits[0, 0])[target]
    left_at = _left(left_at, caches, time, len(tokens))
    return caches, left_at, losses.at[time].set(loss)

  return jax.lax.fori_loop(start, stop, step, state)


def _left(
    left_at: Int[Array, "L K T"], caches: PyTree, time: Any, num_tokens: int
) -> Int[Array, "L K T"]:
  """Notes the query at which tokens are missing that were there before.

  Args:
    left_at: So far.
    caches: After the query, which saw just what they have.
    time: The query's place.
    num_tokens: T.
  """
  kept = jnp.stack([_kept(cache, *left_at.shape[1:]) for cache in caches])
  is_before = (jnp.arange(num_tokens) < time)[None, None]
  leaves = is_before & ~kept & (left_at == num_tokens)
  return jnp.where(leaves, time, left_at)


def _kept(cache: Any, num_heads: int, num_tokens: int) -> Bool[Array, "K T"]:
  """Which tokens a layer's cache has."""
  positions = layer_hooks.inner(cache).kept_positions()
  if positions is None:
    return jnp.ones((num_heads, num_tokens), bool)
  # Empty slots have position -1, which would be the last token.
  places = jnp.where(positions[0] < 0, num_tokens, positions[0])
  heads = jnp.arange(num_heads)[:, None]
  found = jnp.zeros((num_heads, num_tokens), bool)
  return found.at[heads, places].set(True, mode="drop")
