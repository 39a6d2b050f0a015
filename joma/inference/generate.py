"""Prompts to continuations: one prefill, then decode steps of one token each.

Both are compiled once for all prompts of a padded length and all continuations:
the cache has a fixed capacity and is donated from step to step.

Letters: B batch, T prompt tokens after padding, C capacity.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np

from joma.inference import sampling
from joma.inference import sampling_config
from joma.inference.cache import storage
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
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
    is_finite: Whether the logits of the newest token were numbers, bool [B].
    kv_cache: A cache a layer.
  """

  tokens: storage.Leaf
  positions: storage.Leaf
  is_done: storage.Leaf
  num_new: storage.Leaf
  is_finite: storage.Leaf
  kv_cache: PyTree


def state_of(
    tokens: Int[Array, "B"],
    positions: Int[Array, "B"],
    kv_cache: PyTree,
    eos_ids: tuple[int, ...] = (),
    is_finite: Bool[Array, "B"] | None = None,
) -> DecodeState:
  """Returns the state in which each sequence has its first new token.

  Args:
    tokens: The first new ones.
    positions: Where they stand.
    kv_cache: Of what comes before them.
    eos_ids: Tokens that end a sequence.
    is_finite: Whether the tokens' logits were numbers; None is yes.
  """
  if is_finite is None:
    is_finite = jnp.ones(tokens.shape, bool)
  is_done = _is_eos(tokens, eos_ids)
  return DecodeState(
      tokens, positions, is_done, jnp.int32(1), is_finite, kv_cache
  )


@functools.partial(jax.jit, static_argnames=("model", "sampler", "eos_ids"))
def prefill(
    model: models.Transformer,
    params: PyTree,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    kv_cache: PyTree,
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
  is_finite = _are_finite(logits[:, 0], tokens)
  return state_of(tokens, lengths, kv_cache, eos_ids, is_finite)


@functools.partial(
    jax.jit,
    static_argnames=("model", "sampler", "eos_ids"),
    donate_argnames="state",
)
def decode_step(
    model: models.Transformer,
    params: PyTree,
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
      is_finite=state.is_done | _are_finite(logits[:, 0], tokens),
      kv_cache=kv_cache,
  )


def stream(
    model: models.Transformer,
    params: PyTree,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    sampler: sampling_config.SamplingConfig = sampling_config.GREEDY,
    eos_ids: tuple[int, ...] = (),
    kv_cache: PyTree = None,
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
    UserError: If prompt and continuation do not fit into a cache that nothing
      leaves; if a prompt is empty, is no array of integers, or has an id
      outside of the vocabulary; if prompt and continuation are longer than the
      model's learned positions; and, at the step where it is so, if logits are
      not finite, which no token can be drawn from.
  """
  require.at_least("max_new_tokens", max_new_tokens, 1)
  padded, lengths = pad_prompts(prompts, model.config)
  capacity = padded.shape[1] + max_new_tokens
  models.check_learned_positions(
      model.config, int(lengths.max()) + max_new_tokens - 1
  )
  if kv_cache is None:
    _check_memory(model, len(lengths), capacity)
    kv_cache = full_cache.init(
        model.config, len(lengths), capacity, model.dtype
    )
  # The last token is never taken in.
  check_fits(kv_cache, int(lengths.max()) + max_new_tokens - 1)
  return _steps(
      functools.partial(
          prefill, model, params, padded, lengths, kv_cache, sampler, eos_ids
      ),
      lambda state: decode_step(model, params, state, sampler, eos_ids),
      max_new_tokens,
  )


def _check_memory(
    model: models.Transformer, batch_size: int, capacity: int
) -> None:
  """Raises UserError before keys and values are allocated in vain."""
  config = model.config
  heads = batch_size * config.num_layers * config.num_kv_heads
  itemsize = jnp.dtype(model.dtype).itemsize
  require.memory(
      f"a cache of {capacity} positions (prompt and max_new_tokens)",
      2 * itemsize * heads * capacity * config.head_dim,
  )


def check_fits(kv_cache: PyTree, num_positions: int) -> None:
  """Raises UserError if a text of so many positions outgrows a cache.

  What lies behind its last slot would be dropped, and other tokens come out.

  Args:
    kv_cache: One cache a layer.
    num_positions: Those that are taken in, from 0.
  """
  for layer, cache in enumerate(kv_cache):
    size = cache.num_positions() if isinstance(cache, hooks.Bounded) else None
    if size is not None and size < num_positions:
      raise errors.UserError(
          f"the cache of layer {layer} holds {size} positions and nothing"
          f" leaves it; prompt and continuation take {num_positions}. Give it"
          " as many, or a policy that evicts."
      )


def generate(
    model: models.Transformer,
    params: PyTree,
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
  _check_are_ids(prompts)
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


def _steps(
    start: Callable[[], DecodeState],
    advance: Callable[[DecodeState], DecodeState],
    max_new_tokens: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Steps are dispatched one ahead of what is read: devices never wait."""
  state, was_done = start(), None
  for step in range(max_new_tokens):
    seen = state.tokens, state.is_done, state.is_finite
    if step + 1 < max_new_tokens:
      # The state is donated: what is still to be read is copied first.
      seen = jax.tree.map(jnp.copy, seen)
      state = advance(state)
    tokens, is_done, is_finite = map(np.asarray, seen)
    _check_are_finite(is_finite, step)
    yield tokens, np.ones_like(is_done) if was_done is None else ~was_done
    if is_done.all():
      return
    was_done = is_done


def _are_finite(
    logits: Float[Array, "B V"], tokens: Int[Array, "B"]
) -> Bool[Array, "B"]:
  """Whether tokens were drawn from numbers.

  A NaN counts as the largest logit wherever one is drawn, by argmax as by
  Gumbel noise, so that it is enough to look at the logit of the token.
  """
  drawn = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
  return jnp.isfinite(drawn[:, 0])


def _check_are_finite(is_finite: Bool[np.ndarray, "B"], step: int) -> None:
  if not is_finite.all():
    raise errors.UserError(
        f"Sequence {int(np.argmin(is_finite))}: the logits of new token {step}"
        " are not finite, so that no token can be drawn. Either the KV cache"
        " has no slot left, or the model's parameters or activations are not"
        " finite."
    )


def _check_are_ids(prompts: Sequence[object]) -> None:
  for row, prompt in enumerate(prompts):
    if isinstance(prompt, str):
      raise errors.UserError(
          f"Prompt {row} is the text {prompt!r:.40}: give token ids, as"
          " tokenizer.encode returns them."
      )
    array = np.asarray(prompt)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
      raise errors.UserError(
          f"Prompt {row} must be one row of integers, token ids, got"
          f" {array.dtype} of shape {array.shape}."
      )


def _is_eos(tokens: Int[Array, "B"], eos_ids: tuple[int, ...]) -> Array:
  is_eos = jnp.zeros(tokens.shape, bool)
  for eos in eos_ids:
    is_eos = is_eos | (tokens == eos)
  return is_eos
