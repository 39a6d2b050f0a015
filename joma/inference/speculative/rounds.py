"""Rounds of speculative decoding: guess, verify, keep.

A round takes in the newest token and S guesses at once, and yields from 1 to
S + 1 tokens of each sequence: those that the model itself would have drawn, one
pass for all of them. What the cache took of guesses that did not stay is taken
back (`cache.trial`), so that it is as steps would have left it.

Letters: B batch, S guesses a round, W = S + 1 tokens of a pass, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.inference import decode_steps
from joma.inference import sampling
from joma.inference import sampling_config
from joma.inference.cache import trial
from joma.inference.speculative import drafts
from joma.inference.speculative import round as round_lib
from joma.inference.speculative import rule
from joma.transformer import model as models

Round = round_lib.Round
# Rounds draw with other keys than the token behind a prompt.
_STREAM = 2**30


@functools.partial(
    jax.jit, static_argnames=("draft", "sampler"), donate_argnames="state"
)
def guess(
    draft: drafts.Draft,
    params: PyTree,
    state: PyTree,
    last: Round,
    sampler: sampling_config.SamplingConfig,
) -> drafts.Guess:
  """Lets a draft guess; see `drafts.Draft.guess`."""
  return draft.guess(params, state, last, sampler, _key(sampler, last, 0))


@functools.partial(
    jax.jit,
    static_argnames=("model", "sampler", "eos_ids"),
    donate_argnames="kv_cache",
)
def verify(
    model: models.Transformer,
    params: PyTree,
    guesses: Int[Array, "B S"],
    drawn_by: Float[Array, "B S V"] | None,
    last: Round,
    kv_cache: PyTree,
    sampler: sampling_config.SamplingConfig,
    eos_ids: tuple[int, ...],
) -> tuple[Round, PyTree]:
  """Takes in the newest tokens and guesses; keeps what is right.

  Args:
    model: Static.
    params: Of the model.
    guesses: Of what comes behind the newest tokens; S may be 0.
    drawn_by: Probabilities of the draft; None is that nothing was drawn.
    last: The round before.
    kv_cache: Of all before the newest tokens; donated.
    sampler: How tokens are chosen.
    eos_ids: Tokens that end a sequence.

  Returns:
    The round, and the caches of all that came but for its newest tokens.
  """
  inputs = jnp.concatenate([last.newest[:, None], guesses], axis=1)
  # No more is taken in than may still come.
  step = jnp.arange(inputs.shape[1])[None]
  is_in = ~last.is_done[:, None] & (step < last.num_left[:, None])
  logits, kv_cache = model.apply(
      {"params": params},
      inputs,
      positions=jnp.where(is_in, last.positions[:, None] + step, -1),
      kv_cache=trial.begin(kv_cache),
  )
  count, behind = _verified(logits, guesses, drawn_by, last, sampler)
  guesses = jnp.pad(guesses, ((0, 0), (0, 1)))
  came = jnp.where(step == count[:, None], behind[:, None], guesses)
  counts = _until_end(came, jnp.minimum(count + 1, last.num_left), eos_ids)
  counts = jnp.where(last.is_done, 0, counts)
  kv_cache = trial.keep(kv_cache, counts)
  return _next(last, came, counts, logits, eos_ids), kv_cache


def _key(
    sampler: sampling_config.SamplingConfig, last: Round, which: int
) -> Array:
  key = jax.random.fold_in(jax.random.key(sampler.seed), _STREAM + which)
  return jax.random.fold_in(key, last.number)


def _verified(
    logits: Float[Array, "B W V"],
    guesses: Int[Array, "B S"],
    drawn_by: Float[Array, "B S V"] | None,
    last: Round,
    sampler: sampling_config.SamplingConfig,
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
  """Returns how many guesses stay, and the token behind them."""
  if sampling.is_greedy(sampler):
    return rule.greedy(logits.argmax(axis=-1).astype(jnp.int32), guesses)
  if drawn_by is None:
    drawn_by = jax.nn.one_hot(guesses, logits.shape[-1])
  keys = lambda which: sampling.row_keys(
      _key(sampler, last, which), len(guesses)
  )
  uniform = lambda key: jax.random.uniform(key, guesses.shape[1:])
  count, weights = rule.accept(
      sampling.probs(logits, sampler),
      drawn_by,
      guesses,
      jax.vmap(uniform)(keys(1)),
  )
  drawn = jax.vmap(jax.random.categorical)(keys(2), jnp.log(weights))
  return count, drawn.astype(jnp.int32)


def _until_end(
    came: Int[Array, "B W"], counts: Int[Array, "B"], eos_ids: tuple[int, ...]
) -> Int[Array, "B"]:
  """Counts the token that ends a sequence, and nothing behind it."""
  is_end = decode_steps.is_eos(came, eos_ids)
  first = jnp.where(is_end.any(axis=1), is_end.argmax(axis=1), came.shape[1])
  return jnp.minimum(counts, first + 1).astype(jnp.int32)


def _next(
    last: Round,
    came: Int[Array, "B W"],
    counts: Int[Array, "B"],
    logits: Float[Array, "B W V"],
    eos_ids: tuple[int, ...],
) -> Round:
  is_new = jnp.arange(came.shape[1])[None] < counts[:, None]
  end = jnp.maximum(counts - 1, 0)[:, None]
  newest = jnp.take_along_axis(came, end, axis=1)[:, 0]
  newest = jnp.where(counts > 0, newest, last.newest)
  # A NaN is the largest logit wherever one is drawn.
  drawn = jnp.take_along_axis(logits, came[..., None], axis=-1)[..., 0]
  num_left = last.num_left - counts
  is_over = decode_steps.is_eos(newest, eos_ids) | (num_left <= 0)
  return Round(
      came=came,
      counts=counts,
      newest=newest,
      positions=last.positions + counts,
      num_left=num_left,
      is_done=last.is_done | is_over,
      is_finite=(jnp.isfinite(drawn) | ~is_new).all(axis=1),
      number=last.number + 1,
  )
