"""Three ways to read a text through a cache that evicts, and to answer.

agnostic  the context is read at once and compressed; question and answer come
          on top, and nothing more leaves: what the leaderboard of kvpress shows
aware     context and question are read at once and compressed together, so
          that a policy knows what is asked; the answer comes on top
decoding  tokens are read one by one, and from the first one on the cache has
          its target size, while the answer is generated too

Budgets of the first two are of the tokens that each text compresses, those of
the last of the longest text, whose slots are a static size.

Letters: B texts, T tokens of a context, Q of a question, A of an answer, K key
and value heads, C slots.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree
import numpy as np

from joma.inference import prompt_ids
from joma.inference.cache import calls
from joma.inference.cache import kv_cache as kv_cache_lib
from joma.inference.cache import rehearsal
from joma.inference.cache import slot_arrays
from joma.inference.cache import slot_step
from joma.inference.evaluation.protocols import scopes
from joma.inference.evaluation.ruler import ruler_config
from joma.inference.evaluation.ruler import written as written_lib
from joma.transformer import hooks
from joma.transformer import model as models
from scansnap_jax.experiment import errors

Protocol = ruler_config.Protocol
# Empty caches for B texts of so many slots of a KV head.
MakeCaches = Callable[[int, int], tuple[Any, ...]]


class Sizes(NamedTuple):
  """Sizes to which all texts are padded, so that few programs serve them.

  Attributes:
    context: T of the longest.
    question: Q of the longest.
    answer: A, tokens that are generated at most.
  """

  context: int
  question: int
  answer: int


class Setting(NamedTuple):
  """How texts are read.

  Attributes:
    protocol: Which of the three.
    budget: Share of the tokens that stay; 1 keeps all.
    make_caches: Makes empty caches.
    sizes: Of all texts.
    eos_ids: Tokens that end an answer.
    request: Tokens that ask for what a policy that rehearses reads again.
    scope: Among which tokens a budget chooses; of `decoding` a head's own.
  """

  protocol: Protocol
  budget: float
  make_caches: MakeCaches
  sizes: Sizes
  eos_ids: tuple[int, ...] = ()
  request: tuple[int, ...] = ()
  scope: ruler_config.Scope = "head"


def num_slots(protocol: Protocol, budget: float, sizes: Sizes) -> int:
  """Returns the slots of a KV head for the longest text."""
  context, question, answer = sizes
  if budget >= 1:
    return context + question + answer
  compressed = context + (0 if protocol == "agnostic" else question)
  return max(round(budget * compressed), 1)


def num_kept(setting: Setting, text: written_lib.Written) -> int:
  """Returns the tokens of a text's context that stay, `agnostic`."""
  slots = num_slots(setting.protocol, setting.budget, setting.sizes)
  lengths = jnp.array([len(text.context)])
  return int(_share(slots, lengths, setting.sizes.context)[0])


def answer(
    setting: Setting,
    model: models.Transformer,
    params: PyTree,
    texts: Sequence[written_lib.Written],
    num_new: int,
) -> list[Int[np.ndarray, "A"]]:
  """Reads texts side by side and answers greedily.

  Args:
    setting: How; the same one for all calls whose programs are to be shared.
    model: A Transformer.
    params: Its parameters.
    texts: At most as long as the setting's sizes.
    num_new: Tokens of an answer, from 1 to the setting's size.

  Returns:
    The tokens of each answer, without the one that ends it.

  Raises:
    UserError: A cache of the policy's own kind cannot keep what comes on top,
      or logits are not finite.
  """
  sizes = setting.sizes
  contexts = [text.context for text in texts]
  questions = [text.question for text in texts]
  whole = [np.concatenate(text) for text in texts]
  if setting.protocol == "decoding":
    caches = _empty(setting, len(texts))
    given = _padded(whole, sizes.context + sizes.question)
    starts = jnp.zeros(len(texts), jnp.int32)
    return _answer(setting, model, params, caches, given, starts, num_new)
  if setting.protocol == "agnostic":
    rows, starts = _padded(contexts, sizes.context)
    _, caches = _compress(setting, model, params, rows, starts)
    given = _padded(questions, sizes.question)
    return _answer(setting, model, params, caches, given, starts, num_new)
  rows, starts = _padded(whole, sizes.context + sizes.question)
  first, caches = _compress(setting, model, params, rows, starts)
  given = first[:, None], jnp.ones_like(starts)
  rest = _answer(setting, model, params, caches, given, starts, num_new - 1)
  return [
      np.array([] if token in setting.eos_ids else [token, *more], np.int32)
      for token, more in zip(first.tolist(), rest, strict=True)
  ]


@functools.partial(jax.jit, static_argnames=("setting", "model"))
def _compress(
    setting: Setting,
    model: models.Transformer,
    params: PyTree,
    rows: Int[Array, "B T"],
    lengths: Int[Array, "B"],
) -> tuple[Int[Array, "B"], tuple[Any, ...]]:
  """Reads texts at once; returns what follows them, and their caches.

  Caches are made within the program, so that it need not be ready for some that
  hold something.
  """
  longest, whole = rows.shape[1], lengths
  caches = rehearsal.prepare(_empty(setting, len(rows)), lengths)
  if rehearsal.are_rehearsing(caches):
    rows, whole = rehearsal.repeat(rows, lengths, setting.request)
  steps = jnp.arange(rows.shape[1])[None]
  logits, caches = model.apply(
      {"params": params},
      rows,
      positions=jnp.where(steps < whole[:, None], steps, -1),
      kv_cache=caches,
      logits_at=lengths - 1,
  )
  first = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
  return first, _settled(setting, caches, lengths, longest)


def _answer(
    setting: Setting,
    model: models.Transformer,
    params: PyTree,
    caches: tuple[Any, ...],
    given: tuple[Int[Array, "B Q"], Int[Array, "B"]],
    starts: Int[Array, "B"],
    num_new: int,
) -> list[Int[np.ndarray, "A"]]:
  """Reads what is given token by token and goes on from it."""
  tokens, is_finite = _go_on(
      setting, model, params, caches, given, starts, num_new
  )
  if not is_finite:
    raise errors.UserError(
        "the logits of an answer are not finite: the model's weights or"
        " activations are not."
    )
  return [row[row >= 0] for row in np.asarray(tokens)]


@functools.partial(jax.jit, static_argnames=("setting", "model"))
def _go_on(
    setting: Setting,
    model: models.Transformer,
    params: PyTree,
    caches: tuple[Any, ...],
    given: tuple[Int[Array, "B Q"], Int[Array, "B"]],
    starts: Int[Array, "B"],
    num_new: int | Int[Array, ""],
) -> tuple[Int[Array, "B A"], Bool[Array, ""]]:
  """One program for the tokens of a question and those of its answer."""
  rows, lengths = given
  batch, most = rows.shape
  size = setting.sizes.answer

  def step(state: _State) -> _State:
    at = state.at
    token = jnp.where(
        at < lengths, rows[:, jnp.minimum(at, most - 1)], state.token
    )
    logits, caches = model.apply(
        {"params": params},
        token[:, None],
        positions=jnp.where(state.is_done, -1, starts + at)[:, None],
        kv_cache=state.caches,
    )
    drawn = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
    place = at - lengths + 1
    is_answer = (place >= 0) & ~state.is_done
    is_end = jnp.isin(drawn, jnp.array(setting.eos_ids or (-1,)))
    said = jnp.where(is_answer & ~is_end, place, size)
    return _State(
        at=at + 1,
        token=drawn,
        answers=state.answers.at[jnp.arange(batch), said].set(
            drawn, mode="drop"
        ),
        is_done=state.is_done | (is_answer & (is_end | (place + 1 >= num_new))),
        is_finite=state.is_finite & jnp.isfinite(logits.max()),
        caches=caches,
    )

  start = _State(
      at=jnp.int32(0),
      token=rows[:, 0],
      answers=jnp.full((batch, size), -1, jnp.int32),
      is_done=jnp.full(batch, num_new < 1),
      is_finite=jnp.bool_(True),
      caches=caches,
  )
  end = jax.lax.while_loop(lambda state: ~state.is_done.all(), step, start)
  return end.answers, end.is_finite


class _State(NamedTuple):
  """Between two tokens; a text that is done takes in nothing more."""

  at: Int[Array, ""]
  token: Int[Array, "B"]
  answers: Int[Array, "B A"]
  is_done: Bool[Array, "B"]
  is_finite: Bool[Array, ""]
  caches: PyTree


def _padded(
    rows: Sequence[np.ndarray], length: int
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
  lengths = jnp.array([len(row) for row in rows], jnp.int32)
  return jnp.asarray(prompt_ids.padded(rows, length)), lengths


def _empty(setting: Setting, batch_size: int) -> tuple[Any, ...]:
  # Whoever is chosen from all heads may have any number of tokens.
  budget = setting.budget if setting.scope == "head" else 1.0
  slots = num_slots(setting.protocol, budget, setting.sizes)
  return setting.make_caches(batch_size, slots)


def _settled(
    setting: Setting,
    caches: PyTree,
    lengths: Int[Array, "B"],
    longest: int,
) -> tuple[Any, ...]:
  """Caches after what they compress, with room for what comes on top."""
  settled, (_, question, more) = [], setting.sizes
  if setting.protocol == "agnostic":
    more += question
  if setting.scope != "head" and setting.budget < 1:
    slots = num_slots(setting.protocol, setting.budget, setting.sizes)
    sizes = _share(slots, lengths, longest)
    caches = scopes.trim(caches, sizes, lengths, scope=setting.scope)
  for cache in caches:
    if isinstance(cache, kv_cache_lib.SlotCache):
      if cache.policy.evicts and setting.budget < 1 and setting.scope == "head":
        cache = trim(cache, _share(cache.capacity, lengths, longest), lengths)
        cache = _grown(cache, more)
    elif not isinstance(cache, hooks.Bounded) or cache.num_positions() is None:
      raise errors.UserError(
          f"{type(cache).__name__} evicts from what it shares out itself, and"
          " cannot keep a question on top: give protocol=decoding."
      )
    settled.append(cache)
  return tuple(settled)


def _share(
    capacity: int, lengths: Int[Array, "B"], longest: int
) -> Int[Array, "B"]:
  """Slots of each text: one that is shorter has fewer of them."""
  share = jnp.round(capacity * lengths / longest)
  return jnp.maximum(share.astype(jnp.int32), 1)


def trim(
    cache: kv_cache_lib.SlotCache,
    sizes: Int[Array, "B"],
    position: Int[Array, "B"],
) -> kv_cache_lib.SlotCache:
  """Empties all but the slots of greatest priority, so many a sequence.

  Args:
    cache: Of one layer.
    sizes: Tokens that each KV head keeps at most.
    position: Of each sequence's next token.
  """
  ranks = calls.rank(cache.policy, slot_step.view(cache), position)
  # Of equal ones the newest stay, as after a prompt.
  order = jnp.argsort(jnp.argsort(ranks[..., ::-1], descending=True))
  is_kept = order[..., ::-1] < sizes[:, None, None]
  return scopes.keep(cache, is_kept, position)


def _grown(cache: kv_cache_lib.SlotCache, more: int) -> kv_cache_lib.SlotCache:
  """Adds empty slots, which the next tokens take before all others."""
  room = cache.capacity + more
  fit = lambda x: slot_arrays.resize(x, room)
  arrays = (cache.key, cache.value, cache.score, cache.aux)
  key, value, score, aux = jax.tree.map(fit, arrays)
  cache = dataclasses.replace(cache, key=key, value=value, score=score, aux=aux)
  return scopes.with_positions(cache, slot_arrays.resize(cache.pos, room, -1))
