"""Prompts to continuations: one prefill, then decode steps of one token each.

Both are compiled once for all prompts of a padded length and all continuations:
the cache has a fixed capacity and is donated from step to step.

Letters: B batch, T prompt tokens after padding, C capacity.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import numpy as np

from joma.inference import sampling
from joma.inference import sampling_config
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """Between two decode steps.

  Attributes:
    tokens: Newest token of each sequence, int32 [B].
    positions: Where it stands, int32 [B].
    is_done: Whether the sequence has ended, bool [B].
    num_new: Tokens generated so far, of the longest, int32.
    kv_cache: A cache a layer.
  """

  tokens: Any
  positions: Any
  is_done: Any
  num_new: Any
  kv_cache: Any


@functools.partial(jax.jit, static_argnames=("model", "sampler", "eos_ids"))
def prefill(
    model: models.Transformer,
    params: Any,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    kv_cache: Any,
    sampler: sampling_config.SamplingConfig = sampling_config.GREEDY,
    eos_ids: tuple[int, ...] = (),
) -> DecodeState:
  """Reads prompts of any length up to T and draws their next tokens.

  Args:
    model: Static.
    params: Of the model.
    prompts: Padded at their ends.
    lengths: Tokens of each prompt, at least 1.
    kv_cache: Empty, of a capacity of at least T.
    sampler: How tokens are chosen.
    eos_ids: Tokens that end a sequence.
  """
  steps = jnp.arange(prompts.shape[1])[None]
  positions = jnp.where(steps < lengths[:, None], steps, -1)
  logits, kv_cache = model.apply(
      {"params": params},
      prompts,
      positions=positions,
      kv_cache=kv_cache,
      logits_at=lengths - 1,
  )
  tokens = sampling.sample(logits[:, 0], sampler)
  is_done = _is_eos(tokens, eos_ids)
  return DecodeState(tokens, lengths, is_done, jnp.int32(1), kv_cache)


@functools.partial(
    jax.jit,
    static_argnames=("model", "sampler", "eos_ids"),
    donate_argnames="state",
)
def decode_step(
    model: models.Transformer,
    params: Any,
    state: DecodeState,
    sampler: sampling_config.SamplingConfig = sampling_config.GREEDY,
    eos_ids: tuple[int, ...] = (),
) -> DecodeState:
  """Takes in the newest tokens and draws the next ones.

  A sequence that has ended repeats its last token. The state is donated.
  """
  logits, kv_cache = model.apply(
      {"params": params},
      state.tokens[:, None],
      positions=state.positions[:, None],
      kv_cache=state.kv_cache,
  )
  tokens = sampling.sample(logits[:, 0], sampler, state.num_new)
  tokens = jnp.where(state.is_done, state.tokens, tokens)
  return DecodeState(
      tokens=tokens,
      positions=state.positions + 1,
      is_done=state.is_done | _is_eos(tokens, eos_ids),
      num_new=state.num_new + 1,
      kv_cache=kv_cache,
  )


def stream(
    model: models.Transformer,
    params: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    sampler: sampling_config.SamplingConfig = sampling_config.GREEDY,
    eos_ids: tuple[int, ...] = (),
    kv_cache: Any = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (tokens, is_new), both [B], a step at a time.

  `is_new` is False for sequences that ended before: their token is to be
  ignored. The token that ends a sequence is yielded.

  Args:
    model: Of which `params` are.
    params: Of the model.
    prompts: Token ids of each, of any lengths from 1.
    max_new_tokens: At most so many steps, from 1.
    sampler: How tokens are chosen.
    eos_ids: Tokens that end a sequence.
    kv_cache: Empty caches; None keeps everything.

  Raises:
    UserError: If a prompt is empty or has an id outside of the vocabulary, or
      if prompt and continuation are longer than the model's learned positions.
  """
  require.at_least("max_new_tokens", max_new_tokens, 1)
  padded, lengths = pad_prompts(prompts, model.config)
  capacity = padded.shape[1] + max_new_tokens
  models.check_learned_positions(
      model.config, int(lengths.max()) + max_new_tokens - 1
  )
  if kv_cache is None:
    kv_cache = full_cache.init(
        model.config, len(lengths), capacity, model.dtype
    )
  return _steps(
      functools.partial(
          prefill, model, params, padded, lengths, kv_cache, sampler, eos_ids
      ),
      lambda state: decode_step(model, params, state, sampler, eos_ids),
      max_new_tokens,
  )


def generate(
    model: models.Transformer,
    params: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    **options: Any,
) -> list[np.ndarray]:
  """Returns the new tokens of each prompt; see `stream` for the arguments."""
  new_tokens = [[] for _ in prompts]
  for tokens, is_new in stream(model, params, prompts, **options):
    for row in np.flatnonzero(is_new):
      new_tokens[row].append(tokens[row])
  return [np.array(row, np.int32) for row in new_tokens]


def pad_prompts(
    prompts: Sequence[Sequence[int] | np.ndarray],
    config: configs.TransformerConfig,
    multiple: int = 64,
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
  """Returns prompts padded at their ends, and their lengths.

  Args:
    prompts: Token ids.
    config: The model's.
    multiple: T is the next one of it, so that few lengths are compiled for,
      but not beyond the model's learned positions.

  Raises:
    UserError: As in `stream`.
  """
  if not len(prompts):
    raise errors.UserError("There is no prompt to continue: give at least one.")
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  seq_len = -(-lengths.max() // multiple) * multiple
  if config.positions == "learned":
    seq_len = min(seq_len, max(config.max_len, lengths.max()))
  padded = np.zeros((len(prompts), seq_len), np.int32)
  for row, prompt in enumerate(prompts):
    if not lengths[row]:
      raise errors.UserError(
          f"Prompt {row} has no tokens: a continuation needs at least one."
      )
    if not (0 <= np.min(prompt) and np.max(prompt) < config.vocab_size):
      raise errors.UserError(
          f"Prompt {row} has token ids from {np.min(prompt)} to"
          f" {np.max(prompt)}; the model knows 0 to {config.vocab_size - 1}."
      )
    padded[row, : lengths[row]] = prompt
  return padded, lengths


def _steps(start, advance, max_new_tokens):
  """Steps are dispatched one ahead of what is read: devices never wait."""
  state, was_done = start(), None
  for step in range(max_new_tokens):
    tokens, is_done = state.tokens, state.is_done
    if step + 1 < max_new_tokens:
      # The state is donated: what is still to be read is copied first.
      tokens, is_done = jnp.copy(tokens), jnp.copy(is_done)
      state = advance(state)
    tokens, is_done = np.asarray(tokens), np.asarray(is_done)
    yield tokens, np.ones_like(is_done) if was_done is None else ~was_done
    if is_done.all():
      return
    was_done = is_done


def _is_eos(tokens: Int[Array, "B"], eos_ids: tuple[int, ...]) -> Array:
  is_eos = jnp.zeros(tokens.shape, bool)
  for eos in eos_ids:
    is_eos = is_eos | (tokens == eos)
  return is_eos
