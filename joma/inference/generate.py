"""Prompts to continuations: prompts are read, then one token follows another.

The programs are those of `decode_steps`. Caches that keep everything are of few
sizes and read prompts piece by piece, so that few programs serve all lengths;
those that evict choose among whole prompts, which are padded to few lengths.

Letters: B batch, T prompt tokens after padding, C capacity.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int, PyTree
import numpy as np

from joma.inference import decode_steps
from joma.inference import prompt_ids
from joma.inference import prompt_work
from joma.inference import sampling_config
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import model as models
from joma.transformer.rope import absolute
from joma.transformer.text import sizes
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

DecodeState = decode_steps.DecodeState
state_of = decode_steps.state_of
prefill = decode_steps.prefill
decode_step = decode_steps.decode_step
check_follows = decode_steps.check_follows
# Tokens [B], and whether they are new.
Shown = tuple[np.ndarray, np.ndarray]


class Steps(Iterator[Shown]):
  """Steps are dispatched one ahead of what is read: devices never wait.

  Attributes:
    last: State of the newest step; None before the first.
    is_last_shown: Whether its token has been yielded.
  """

  def __init__(
      self,
      start: Callable[[], DecodeState],
      advance: Callable[[DecodeState], DecodeState],
      max_new_tokens: int,
  ):
    """Nothing is computed before the first `next`."""
    self.last: DecodeState | None = None
    self.is_last_shown = False
    self._steps = self._run(start, advance, max_new_tokens)

  def __next__(self) -> Shown:
    return next(self._steps)

  def _run(
      self,
      start: Callable[[], DecodeState],
      advance: Callable[[DecodeState], DecodeState],
      max_new_tokens: int,
  ) -> Iterator[Shown]:
    self.last, was_done = start(), None
    for step in range(max_new_tokens):
      state = self.last
      if step + 1 < max_new_tokens:
        self.last = advance(state)
      tokens, is_done, is_finite = (
          np.asarray(x) for x in (state.tokens, state.is_done, state.is_finite)
      )
      # The newest: those of the step before have been donated to it.
      check_are_finite(is_finite, step, self.last.kv_cache)
      # Sequences that have ended take in nothing more.
      is_over = bool(is_done.all())
      self.is_last_shown = is_over or step + 1 == max_new_tokens
      yield tokens, np.ones_like(is_done) if was_done is None else ~was_done
      if is_over:
        return
      was_done = is_done


def stream(
    model: models.Transformer,
    params: PyTree,
    prompts: prompt_ids.Prompts,
    *,
    max_new_tokens: int,
    sampler: sampling_config.SamplingConfig = sampling_config.GREEDY,
    eos_ids: tuple[int, ...] = (),
    kv_cache: PyTree = None,
    starts: Sequence[int] | Int[np.ndarray, "B"] | None = None,
    prefill_chunk: int | None = None,
    donate_cache: bool = False,
) -> Steps:
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
    kv_cache: A cache a layer; None keeps everything.
    starts: Position of each prompt's first token, for caches that hold what
      comes before; None is 0.
    prefill_chunk: Tokens that are worked on at a time while prompts are read,
      which bounds the memory of long ones; None is a size that fits.
    donate_cache: Whether what is given as `kv_cache` may be written over.

  Raises:
    UserError: If a cache cannot follow one of the model's systems; if prompt
      and continuation do not fit into a cache that nothing leaves; if a prompt
      is empty, is no array of integers, or has an id outside of the vocabulary;
      if prompt and continuation are longer than the model's learned positions;
      and, at the step where it is so, if logits are not finite, which no token
      can be drawn from.
  """
  require.at_least("max_new_tokens", max_new_tokens, 1)
  require.at_least("prefill_chunk", prefill_chunk or 1, 1)
  lengths = prompt_ids.lengths_of(prompts, model.config)
  starts = _starts_of(starts, lengths)
  # The last token is never taken in.
  num_positions = int((starts + lengths).max()) + max_new_tokens - 1
  absolute.check_learned_positions(model.config, num_positions)
  if kv_cache is not None:
    check_follows(model, len(lengths), functools.partial(tuple, kv_cache))
  if kv_cache is None:
    kv_cache = empty_caches(model, len(lengths), num_positions + 1)
  elif _take_pieces(kv_cache) and not donate_cache:
    # They are donated from piece to piece.
    kv_cache = jax.tree.map(jnp.copy, kv_cache)
  check_fits(kv_cache, num_positions)
  if not _take_pieces(kv_cache):
    prompt_work.check_whole(model.config, lengths.tolist(), model.dtype)
  read = _read_in_pieces if _take_pieces(kv_cache) else _read_at_once
  return Steps(
      lambda: read(
          model,
          params,
          prompts,
          (lengths, starts),
          kv_cache,
          prefill_chunk,
          sampler=sampler,
          eos_ids=eos_ids,
      ),
      lambda state: decode_steps.advance(
          model,
          params,
          dataclasses.replace(state, kv_cache=None),
          state.kv_cache,
          sampler,
          eos_ids,
      ),
      max_new_tokens,
  )


def generate(
    model: models.Transformer,
    params: PyTree,
    prompts: prompt_ids.Prompts,
    **options: Any,
) -> list[np.ndarray]:
  """Returns the new tokens of each prompt; see `stream` for the arguments."""
  new_tokens = [[] for _ in prompts]
  for tokens, is_new in stream(model, params, prompts, **options):
    for row in np.flatnonzero(is_new):
      new_tokens[row].append(tokens[row])
  return [np.array(row, np.int32) for row in new_tokens]


def pad_prompts(
    prompts: prompt_ids.Prompts,
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
  lengths = prompt_ids.lengths_of(prompts, config)
  seq_len = -(-int(lengths.max()) // multiple) * multiple
  if config.positions == "learned":
    seq_len = min(seq_len, max(config.max_len, int(lengths.max())))
  return prompt_ids.padded(prompts, seq_len), lengths


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


def _starts_of(
    starts: Sequence[int] | Int[np.ndarray, "B"] | None,
    lengths: Int[np.ndarray, "B"],
) -> Int[np.ndarray, "B"]:
  if starts is None:
    return np.zeros_like(lengths)
  places = np.asarray(starts, np.int32)
  if places.shape != lengths.shape or places.min() < 0:
    raise errors.UserError(
        f"starts must be {len(lengths)} positions from 0, one a prompt, got"
        f" {starts!r:.80}."
    )
  return places


def empty_caches(
    model: models.Transformer, batch_size: int, num_positions: int
) -> PyTree:
  """Returns caches that keep everything, of few sizes.

  Args:
    model: Of one type of numbers.
    batch_size: B.
    num_positions: Of the longest text, prompt and continuation.

  Raises:
    UserError: If no memory holds them.
  """
  config = model.config
  capacity = prompt_work.capacity(
      config, batch_size, num_positions, model.dtype
  )
  make = lambda: full_cache.init(config, batch_size, capacity, model.dtype)
  caches = jax.eval_shape(make)
  if not _take_pieces(caches):
    return make()
  # Zeros from the host: no program for each of their shapes.
  zeros = lambda x: jax.device_put(np.zeros(x.shape, x.dtype), may_alias=False)
  return jax.tree.map(zeros, caches)


def _take_pieces(kv_cache: PyTree) -> bool:
  return all(
      isinstance(cache, hooks.TakesPieces) and cache.takes_pieces()
      for cache in kv_cache
  )


def _read_in_pieces(
    model: models.Transformer,
    params: PyTree,
    prompts: prompt_ids.Prompts,
    where: tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B"]],
    kv_cache: PyTree,
    prefill_chunk: int | None,
    **options: Any,
) -> DecodeState:
  """Piece by piece, into caches to which that is all the same."""
  (lengths, starts), longest = where, int(where[0].max())
  size = prefill_chunk or sizes.piece(_capacity(kv_cache, longest))
  if model.config.positions == "learned":
    size = min(size, model.config.max_len)
  rows = prompt_ids.padded(prompts, -(-longest // size) * size)
  found = np.zeros(len(rows), np.int32), np.ones(len(rows), bool)
  state = None
  for place in range(0, longest, size):
    state = decode_steps.read_piece(
        model,
        params,
        rows[:, place : place + size],
        np.int32(place),
        lengths,
        starts,
        found,
        kv_cache,
        **options,
    )
    found, kv_cache = (state.tokens, state.is_finite), state.kv_cache
  assert state is not None  # Every prompt has a token.
  return state


def _capacity(kv_cache: PyTree, longest: int) -> int:
  """Positions of the least cache, or of the text where none is bounded."""
  found = [c.num_positions() for c in kv_cache if isinstance(c, hooks.Bounded)]
  return min((size for size in found if size is not None), default=longest)


def _read_at_once(
    model: models.Transformer,
    params: PyTree,
    prompts: prompt_ids.Prompts,
    where: tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B"]],
    kv_cache: PyTree,
    prefill_chunk: int | None,
    **options: Any,
) -> DecodeState:
  """Whole prompts, of which only what each token has alone is in pieces."""
  lengths, starts = where
  size = sizes.length(int(lengths.max()), model.config)
  rows = prompt_ids.padded(prompts, size)
  if prefill_chunk is not None:
    model = model.clone(mlp_piece=min(prefill_chunk, size))
  return decode_steps.prefill(
      model, params, rows, lengths, kv_cache, starts=starts, **options
  )


def check_are_finite(
    is_finite: Bool[np.ndarray, "B"], step: int, kv_cache: PyTree
) -> None:
  """Raises UserError if a token was drawn from what is no number.

  Args:
    is_finite: Of each sequence's newest token.
    step: Which of the new tokens it is, from 0.
    kv_cache: A cache a layer, which may say why.
  """
  if is_finite.all():
    return
  reason = (
      "Either the KV cache has no slot left, or the model's parameters or"
      " activations are not finite."
  )
  for layer, cache in enumerate(kv_cache):
    told = cache.overflow() if isinstance(cache, hooks.Overflows) else None
    if told is not None:
      reason = f"Layer {layer}: {told}"
      break
  raise errors.UserError(
      f"Sequence {int(np.argmin(is_finite))}: the logits of new token {step}"
      f" are not finite, so that no token can be drawn. {reason}"
  )
