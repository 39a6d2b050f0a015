"""Prompts to continuations, several tokens a pass: as `generate`, with a draft.

Letters: B batch.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from joma.inference import generate
from joma.inference import prompt_ids
from joma.inference import sampling_config
from joma.inference.cache import trial
from joma.inference.speculative import drafts
from joma.inference.speculative import round as round_lib
from joma.inference.speculative import rounds
from joma.transformer import model as models
from joma.transformer.rope import absolute
from scansnap_jax.experiment import require

# A round, the model's caches and the draft's state.
Held = tuple[round_lib.Round, PyTree, PyTree]


class Rounds(Iterator[generate.Shown]):
  """Tokens of rounds, one of each sequence at a time.

  Attributes:
    kv_cache: Of all that has been taken in; None before the first token.
    num_rounds: Passes after the prompts.
    num_yielded: Tokens of these, of all sequences together.
    num_passes: Sequences that were not over, summed over passes.
    num_guesses: Guesses, likewise.
  """

  def __init__(
      self, start: Callable[[], Held], take: Callable[[Held], tuple[Held, int]]
  ):
    """Nothing is computed before the first `next`.

    Args:
      start: Reads the prompts.
      take: Takes a round, and says how many guesses it had of a sequence.
    """
    self.kv_cache: PyTree = None
    self.num_rounds = self.num_yielded = 0
    self.num_passes = self.num_guesses = 0
    self._steps = self._run(start, take)

  def __next__(self) -> generate.Shown:
    return next(self._steps)

  def summary(self) -> str:
    """Says what the draft gave."""
    passes = max(self.num_passes, 1)
    accepted = self.num_yielded - self.num_passes
    return (
        f"{accepted / passes:.2f} guesses accepted a step"
        f" ({accepted} of {self.num_guesses}),"
        f" {self.num_yielded / passes:.2f} tokens a step and sequence"
    )

  def _run(
      self,
      start: Callable[[], Held],
      take: Callable[[Held], tuple[Held, int]],
  ) -> Iterator[generate.Shown]:
    held = start()
    yield from self._shown(held)
    while not np.asarray(held[0].is_done).all():
      held, num_guesses = take(held)
      counts = np.asarray(held[0].counts)
      self.num_rounds += 1
      self.num_yielded += int(counts.sum())
      self.num_passes += int((counts > 0).sum())
      self.num_guesses += num_guesses * int((counts > 0).sum())
      yield from self._shown(held)

  def _shown(self, held: Held) -> Iterator[generate.Shown]:
    last, self.kv_cache, _ = held
    counts, came = np.asarray(last.counts), np.asarray(last.came)
    is_finite = np.asarray(last.is_finite)
    generate.check_are_finite(is_finite, self.num_rounds, self.kv_cache)
    for step in range(int(counts.max())):
      yield came[:, step], step < counts


def stream(
    model: models.Transformer,
    params: PyTree,
    prompts: prompt_ids.Prompts,
    draft: drafts.Draft,
    draft_params: PyTree = None,
    *,
    max_new_tokens: int,
    sampler: sampling_config.SamplingConfig = sampling_config.GREEDY,
    eos_ids: tuple[int, ...] = (),
    kv_cache: PyTree = None,
    prefill_chunk: int | None = None,
) -> Rounds:
  """Yields (tokens, is_new), both [B], as `generate.stream` does.

  Greedy, the tokens are those of `generate.stream`, but where two logits are
  equal to rounding: a pass over several tokens rounds in another order than
  one over a single token. Drawn, they have the same distribution.

  Args:
    model: Of which `params` are.
    params: Of the model.
    prompts: Token ids of each, of any lengths from 1.
    draft: Who guesses.
    draft_params: Of the draft's model, if it has one.
    max_new_tokens: Of each sequence, at most.
    sampler: How tokens are chosen, guesses too.
    eos_ids: Tokens that end a sequence.
    kv_cache: Empty, a cache a layer; None keeps everything.
    prefill_chunk: As in `generate.stream`.

  Raises:
    UserError: As `generate.stream`; if tokens cannot be taken back from a
      layer's cache; if the draft's model has another vocabulary.
  """
  require.at_least("max_new_tokens", max_new_tokens, 1)
  lengths = prompt_ids.lengths_of(prompts, model.config)
  # The last token is never taken in.
  num_positions = int(lengths.max()) + max_new_tokens - 1
  absolute.check_learned_positions(model.config, num_positions)
  draft.check(model.config, num_positions)
  if kv_cache is None:
    kv_cache = generate.empty_caches(model, len(lengths), num_positions + 1)
  else:
    kv_cache = jax.tree.map(jnp.copy, kv_cache)
  trial.check(kv_cache)
  generate.check_fits(kv_cache, num_positions)
  options = {"sampler": sampler, "eos_ids": eos_ids}
  steps = generate.stream(
      model,
      params,
      prompts,
      max_new_tokens=1,
      kv_cache=kv_cache,
      prefill_chunk=prefill_chunk,
      donate_cache=True,
      **options,
  )

  def start() -> Held:
    next(steps)
    assert steps.last is not None  # It has just read.
    state = draft.begin(draft_params, prompts, num_positions)
    return (
        round_lib.first(steps.last, max_new_tokens),
        steps.last.kv_cache,
        state,
    )

  def take(held: Held) -> tuple[Held, int]:
    last, caches, state = held
    guess = rounds.guess(draft, draft_params, state, last, sampler)
    tokens, is_found = guess.tokens, guess.is_found
    if is_found is not None and not np.asarray(is_found).any():
      tokens = tokens[:, :0]  # A step like any other.
    last, caches = rounds.verify(
        model, params, tokens, guess.probs, last, caches, **options
    )
    return (last, caches, guess.state), tokens.shape[1]

  return Rounds(start, take)
