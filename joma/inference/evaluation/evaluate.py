"""Reads texts through a KV cache and looks at what comes out, and what is kept.

Every token of a text, or of its end, goes through the decode path: one
compilation reads any text of a length. What is read is teacher-forced; answers
of several tokens are then generated greedily.

Letters: B texts, T tokens, M gold tokens, L layers, V vocabulary.
"""

import functools
import time
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np

from joma.inference import generate
from joma.inference.evaluation import tasks
from joma.transformer import layer_hooks
from joma.transformer import model as models
from joma.transformer.rope import absolute
from joma.transformer.text import sizes
from scansnap_jax.experiment import errors


@runtime_checkable
class KnowsPositions(Protocol):
  """A cache that keeps tokens apart."""

  def kept_positions(self) -> Int[Array, "B K C"] | None:
    """Positions that each KV head keeps, -1 elsewhere; None is all."""
    ...


# In the place of a token: the logits were not finite, and none is likely.
_NO_TOKEN = -2
# In the place of a share, on the device: NaN is a fault there.
_NOT_ASKED = -1.0


class Reading(NamedTuple):
  """What reading texts token by token showed.

  Attributes:
    next_tokens: Most likely token after each, [B, T]; -2 where logits are NaN
      or infinite.
    losses: Cross-entropy in nats of the token after each, [B, T]; 0 where the
      text has ended.
    recall: Share of the gold tokens of a query that its layer still had, mean
      over KV heads, [B, T, L]; -1 where nothing is asked.
    kv_cache: After the last token.
  """

  next_tokens: Int[Array, "B T"]
  losses: Float[Array, "B T"]
  recall: Float[Array, "B T L"]
  kv_cache: PyTree


@functools.partial(
    jax.jit, static_argnames=("model",), donate_argnames=("kv_cache",)
)
def read(
    model: models.Transformer,
    params: PyTree,
    tokens: Int[Array, "B T"],
    starts: Int[Array, "B"],
    lengths: Int[Array, "B"],
    golds: Int[Array, "B T M"],
    kv_cache: PyTree,
) -> Reading:
  """Reads texts token by token, as many as the longest has.

  Args:
    model: Static.
    params: Of the model.
    tokens: Padded at their ends, which takes no time.
    starts: Position of each text's first token: what the cache has read.
    lengths: Tokens of each text here; 0 reads nothing.
    golds: Positions of gold tokens of the query at each token, else -1.
    kv_cache: A cache a layer; donated.
  """
  seq_len = tokens.shape[1]
  # With JAX_DISABLE_JIT they come as they are, and NumPy takes no traced index.
  tokens, golds = jnp.asarray(tokens), jnp.asarray(golds)
  targets = jnp.roll(tokens, -1, axis=1)

  def step(time: Any, kv_cache: PyTree) -> tuple[PyTree, Any]:
    token, target, gold = (x[:, time] for x in (tokens, targets, golds))
    is_read = time < lengths
    positions = jnp.where(is_read, starts + time, -1)
    logits, kv_cache = model.apply(
        {"params": params},
        token[:, None],
        positions=positions[:, None],
        kv_cache=kv_cache,
    )
    logits = logits[:, 0]
    picked = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    loss = jax.nn.logsumexp(logits, axis=1) - picked
    loss = jnp.where(time + 1 < lengths, loss, 0.0)
    recall = _recall_where_asked(kv_cache, gold, is_read)
    return kv_cache, (_most_likely(logits), loss, recall)

  def write(time: Any, carry: Any) -> Any:
    kv_cache, found = carry
    kv_cache, new = step(time, kv_cache)
    put = lambda all_, one: all_.at[:, time].set(one)
    return kv_cache, jax.tree.map(put, found, new)

  # One compilation for texts of all lengths: what has ended is padding.
  _, kinds = jax.eval_shape(step, 0, kv_cache)
  nothing = (_NO_TOKEN, 0.0, _NOT_ASKED)
  empty = tuple(
      jnp.full((len(tokens), seq_len, *kind.shape[1:]), value, kind.dtype)
      for kind, value in zip(kinds, nothing, strict=True)
  )
  kv_cache, found = jax.lax.fori_loop(
      0, lengths.max(), write, (kv_cache, empty)
  )
  next_tokens, losses, recall = found
  return Reading(next_tokens, losses, recall, kv_cache)


def _recall_where_asked(
    kv_cache: PyTree, gold: Int[Array, "B M"], is_read: Bool[Array, "B"]
) -> Float[Array, "B L"]:
  """`gold_recall` of the texts that go on; -1 where nothing is asked."""
  # Recall takes time, and most tokens ask nothing.
  recall = jax.lax.cond(
      ((gold >= 0) & is_read[:, None]).any(),
      lambda cache: gold_recall(cache, gold),
      lambda cache: jnp.full((len(gold), len(cache)), _NOT_ASKED),
      kv_cache,
  )
  return jnp.where(is_read[:, None], recall, _NOT_ASKED)


def gold_recall(
    kv_cache: PyTree, gold: Int[Array, "B M"]
) -> Float[Array, "B L"]:
  """Share of gold tokens that are kept, by layer, mean over KV heads.

  Args:
    kv_cache: A cache a layer.
    gold: Positions; -1 is none. A text without any gives -1, and so does a
      layer whose mixer keeps a state of all tokens together.
  """
  is_gold = gold >= 0
  number = is_gold.sum(axis=1)
  layers = []
  for cache in map(layer_hooks.inner, kv_cache):
    if not isinstance(cache, KnowsPositions):
      layers.append(jnp.full(number.shape, _NOT_ASKED))
      continue
    pos = cache.kept_positions()
    if pos is None:
      layers.append(jnp.where(number > 0, 1.0, _NOT_ASKED))
      continue
    is_kept = (pos[..., None] == gold[:, None, None]).any(axis=2)
    kept = (is_kept & is_gold[:, None]).sum(axis=2).mean(axis=1)
    share = kept / jnp.maximum(number, 1)
    layers.append(jnp.where(number > 0, share, _NOT_ASKED))
  return jnp.stack(layers, axis=1)


def _with_nans(recall: Float[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
  """On the host, where no trap of JAX_DEBUG_NANS takes it for a fault."""
  return np.where(recall == _NOT_ASKED, np.nan, recall)


@functools.partial(
    jax.jit, static_argnames=("model",), donate_argnames=("kv_cache",)
)
def read_at_once(
    model: models.Transformer,
    params: PyTree,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    kv_cache: PyTree,
) -> tuple[Int[Array, "B"], PyTree]:
  """Reads prompts in one go; returns the most likely next tokens and caches."""
  steps = jnp.arange(tokens.shape[1])[None]
  logits, kv_cache = model.apply(
      {"params": params},
      tokens,
      positions=jnp.where(steps < lengths[:, None], steps, -1),
      kv_cache=kv_cache,
      logits_at=lengths - 1,
  )
  return _most_likely(logits[:, 0]), kv_cache


def _most_likely(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
  """The tokens of the largest logits, `_NO_TOKEN` where that is no number.

  A NaN counts as the largest wherever there is one.
  """
  is_finite = jnp.isfinite(logits.max(axis=1))
  return jnp.where(is_finite, logits.argmax(axis=1), _NO_TOKEN).astype(
      jnp.int32
  )


class Answers(NamedTuple):
  """What a batch of examples was answered.

  Attributes:
    predicted: Most likely token at each query, [B, T], -1 elsewhere.
    generated: Greedy continuation of each text, [B, num_new].
    recall: Of gold tokens at each query, [B, T, L], else NaN.
    ms_per_step: Of the decode steps of reading, or of generating where all was
      read at once; NaN where there was one step at most.
    is_finite: Whether all tokens of a text came from numbers, [B]: what was
      answered means nothing otherwise.
    kv_cache: After all.
  """

  predicted: Int[np.ndarray, "B T"]
  generated: Int[np.ndarray, "B A"]
  recall: Float[np.ndarray, "B T L"]
  ms_per_step: float
  is_finite: Bool[np.ndarray, "B"]
  kv_cache: PyTree


def answer(
    model: models.Transformer,
    params: PyTree,
    batch: tasks.Batch,
    kv_cache: PyTree,
    *,
    reading: str = "tokens",
    num_new: int | None = None,
) -> Answers:
  """Reads examples and answers them.

  Args:
    model: A Transformer.
    params: Its parameters.
    batch: Examples.
    kv_cache: Empty caches; donated.
    reading: As in `evaluate_config.EvaluateConfig`.
    num_new: Tokens to generate; None is those of the longest answer.

  Raises:
    UserError: If a token is outside of the vocabulary, or the texts and what
      is generated are beyond the model's learned positions.
  """
  num_new = batch.num_new if num_new is None else num_new
  check(model, batch.tokens, num_new)
  if reading == "prompt":
    seen = _read_prompts(model, params, batch, kv_cache)
  else:
    is_split = reading == "context"
    seen = _read_by_token(model, params, batch, kv_cache, is_split)
  first = seen.predicted[np.arange(len(batch.lengths)), batch.lengths - 1]
  generated, kv_cache, found, goes_on = _continue(
      model, params, first, batch.lengths, num_new, seen.kv_cache
  )
  is_asked = batch.targets >= 0
  is_finite = ((seen.predicted != _NO_TOKEN) | ~is_asked).all(axis=1)
  return Answers(
      predicted=np.where(is_asked, seen.predicted, -1),
      generated=generated,
      recall=seen.recall,
      ms_per_step=found if seen.ms_per_step is None else seen.ms_per_step,
      is_finite=is_finite & goes_on,
      kv_cache=kv_cache,
  )


class _Seen(NamedTuple):
  """What reading alone showed; as in `Answers`, where nothing is asked too."""

  predicted: Int[np.ndarray, "B T"]
  recall: Float[np.ndarray, "B T L"]
  ms_per_step: float | None
  kv_cache: PyTree


def _read_prompts(
    model: models.Transformer,
    params: PyTree,
    batch: tasks.Batch,
    kv_cache: PyTree,
) -> _Seen:
  """Reads texts in one go; only what follows the last token is seen."""
  shape = batch.tokens.shape
  last = np.arange(shape[0]), batch.lengths - 1
  tokens = _padded(batch.tokens, model)
  first, kv_cache = read_at_once(model, params, tokens, batch.lengths, kv_cache)
  predicted = np.full(shape, -1, np.int32)
  predicted[last] = first
  layers = gold_recall(kv_cache, jnp.asarray(batch.gold[last]))
  recall = np.full((*shape, layers.shape[1]), np.nan, np.float32)
  recall[last] = _with_nans(np.asarray(layers))
  return _Seen(predicted, recall, None, kv_cache)


def _read_by_token(
    model: models.Transformer,
    params: PyTree,
    batch: tasks.Batch,
    kv_cache: PyTree,
    is_split: bool,
) -> _Seen:
  """Reads token by token; where split, what follows a context read at once."""
  starts = np.zeros_like(batch.lengths)
  if is_split:
    starts = batch.num_context
    # All but the context's tokens are padding here.
    context = _padded(batch.tokens[:, : starts.max()], model)
    _, kv_cache = read_at_once(model, params, context, starts, kv_cache)
  tokens, gold = _from(batch.tokens, starts), _from(batch.gold, starts)
  seen, ms_per_step = timed_read(
      model, params, tokens, starts, batch.lengths - starts, gold, kv_cache
  )
  length = batch.tokens.shape[1]
  predicted = _back(np.asarray(seen.next_tokens), starts, length, -1)
  asked = _with_nans(np.asarray(seen.recall))
  recall = _back(asked, starts, length, np.nan)
  return _Seen(predicted, recall, ms_per_step, seen.kv_cache)


def timed_read(
    model: models.Transformer,
    params: PyTree,
    tokens: Int[np.ndarray, "B T"],
    starts: Int[np.ndarray, "B"],
    lengths: Int[np.ndarray, "B"],
    golds: Int[np.ndarray, "B T M"],
    kv_cache: PyTree,
) -> tuple[Reading, float]:
  """Calls `read`; returns also milliseconds a step, compilation included.

  Few programs serve texts of any length.
  """
  started, seq_len = time.perf_counter(), tokens.shape[1]
  padded, golds = _padded(tokens, model), _padded(golds, model, -1)
  seen = jax.block_until_ready(
      read(model, params, padded, starts, lengths, golds, kv_cache)
  )
  seconds = time.perf_counter() - started
  cut = lambda x: np.asarray(x)[:, :seq_len]  # Without a program.
  found = jax.tree.map(cut, seen._replace(kv_cache=()))
  return found._replace(kv_cache=seen.kv_cache), 1e3 * seconds / seq_len


def _padded(
    values: np.ndarray, model: models.Transformer, filling: int = 0
) -> np.ndarray:
  """Fills texts [B, T, ...] up to one of few lengths."""
  seq_len = values.shape[1]
  missing = sizes.length(seq_len, model.config) - seq_len
  widths = [(0, 0), (0, missing), *[(0, 0)] * (values.ndim - 2)]
  return np.pad(values, widths, constant_values=filling)


def check(
    model: models.Transformer, tokens: Int[np.ndarray, "B T"], num_new: int
) -> None:
  """Raises UserError where a model cannot read texts and go on."""
  vocab_size = model.config.vocab_size
  if tokens.size == 0:
    raise errors.UserError("There is no token to read: a text is empty.")
  if not (0 <= tokens.min() and tokens.max() < vocab_size):
    raise errors.UserError(
        f"Token ids are from {tokens.min()} to {tokens.max()}; the model knows"
        f" 0 to {vocab_size - 1}."
    )
  absolute.check_learned_positions(
      model.config, tokens.shape[1] + max(num_new - 1, 0)
  )


def _continue(
    model: models.Transformer,
    params: PyTree,
    first: Int[np.ndarray, "B"],
    lengths: Int[np.ndarray, "B"],
    num_new: int,
    kv_cache: PyTree,
) -> tuple[Int[np.ndarray, "B A"], Any, float, Bool[np.ndarray, "B"]]:
  """Goes on from the first new token, greedily.

  Returns:
    Tokens, caches, median ms of a step, and whether all came from numbers.
  """
  is_finite, first = first != _NO_TOKEN, np.maximum(first, 0)
  state = generate.state_of(jnp.array(first), jnp.array(lengths), kv_cache)
  generated, seconds = [np.array(first)], []
  for _ in range(num_new - 1):
    started = time.perf_counter()
    state = generate.decode_step(model, params, state)
    generated.append(np.array(state.tokens))
    seconds.append(time.perf_counter() - started)
    is_finite = is_finite & np.asarray(state.is_finite)
  # The first one compiles.
  ms = 1e3 * float(np.median(seconds[1:])) if seconds[1:] else np.nan
  return np.stack(generated, axis=1), state.kv_cache, ms, is_finite


def _from(values: np.ndarray, starts: Int[np.ndarray, "B"]) -> np.ndarray:
  """Moves each row to the left, so that it begins at its start."""
  length = values.shape[1] - int(starts.min())
  index = np.minimum(
      starts[:, None] + np.arange(length)[None], values.shape[1] - 1
  )
  return values[np.arange(len(values))[:, None], index]


def _back(
    values: np.ndarray,
    starts: Int[np.ndarray, "B"],
    length: int,
    filling: float | int,
) -> np.ndarray:
  """Moves each row back to the right, `filling` before its start."""
  shape = (len(values), length, *values.shape[2:])
  found = np.full(shape, filling, values.dtype)
  for row, start in enumerate(starts):
    found[row, start:] = values[row, : length - start]
  return found
