"""Who guesses: n-grams of the text so far, or a smaller model.

A draft is static. What it knows of the texts is a state of arrays, which goes
from round to round and is donated.

Letters: B batch, S guesses a round, L positions of the longest text, V
vocabulary.
"""

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from joma.inference import generate
from joma.inference import prompt_ids
from joma.inference import sampling
from joma.inference import sampling_config
from joma.inference.speculative import draft_config
from joma.inference.speculative import round as round_lib
from joma.transformer import config as configs
from joma.transformer import layer_hooks
from joma.transformer import model as models
from joma.transformer.rope import absolute
from scansnap_jax.experiment import errors

# Texts are padded to multiples of it, so that few programs serve them.
_TEXT_SIZE = 512


class Guess(NamedTuple):
  """Of one round.

  Attributes:
    tokens: What may come behind the newest token.
    probs: By which they were drawn; None is that they were not drawn.
    is_found: Whether a sequence has a guess at all; None is that all have.
    state: The draft's.
  """

  tokens: Int[Array, "B S"]
  probs: Float[Array, "B S V"] | None
  is_found: Bool[Array, "B"] | None
  state: PyTree


@runtime_checkable
class Draft(Protocol):
  """What guesses; hashable, for programs are compiled for it."""

  @property
  def k(self) -> int:
    """S."""
    ...

  def check(
      self, config: configs.TransformerConfig, num_positions: int
  ) -> None:
    """Raises UserError if it cannot guess for a model.

    Args:
      config: The model's.
      num_positions: Of the longest text.
    """
    ...

  def begin(
      self,
      params: PyTree,
      prompts: prompt_ids.Prompts,
      num_positions: int,
  ) -> PyTree:
    """Returns the state after prompts.

    Args:
      params: Of the draft's model, if it has one.
      prompts: Token ids of each.
      num_positions: Of the longest text.
    """
    ...

  def guess(
      self,
      params: PyTree,
      state: PyTree,
      last: round_lib.Round,
      sampler: sampling_config.SamplingConfig,
      key: Array,
  ) -> Guess:
    """Takes in what came, and returns what may come behind it.

    Args:
      params: As in `begin`.
      state: Before what came in the last round.
      last: That round.
      sampler: By which tokens are drawn.
      key: Of this round.
    """
    ...


@dataclasses.dataclass(frozen=True)
class OfText:
  """Guesses what followed the last tokens where they stood before.

  The longest end of the text that occurred earlier counts, up to n tokens, and
  of its places the last. Where the text ends behind it, it is taken to repeat
  itself. State: the texts, int32 [B, L].

  Attributes:
    config: n, least and k.
  """

  config: draft_config.NGram

  @property
  def k(self) -> int:
    """S."""
    return self.config.k

  def check(
      self, config: configs.TransformerConfig, num_positions: int
  ) -> None:
    """Any text has n-grams."""

  def begin(
      self,
      params: PyTree,
      prompts: prompt_ids.Prompts,
      num_positions: int,
  ) -> Int[Array, "B L"]:
    """The texts themselves."""
    del params
    size = -(-(num_positions + 1) // _TEXT_SIZE) * _TEXT_SIZE
    return jnp.asarray(prompt_ids.padded(prompts, size))

  def guess(
      self,
      params: PyTree,
      state: Int[Array, "B L"],
      last: round_lib.Round,
      sampler: sampling_config.SamplingConfig,
      key: Array,
  ) -> Guess:
    """Nothing is drawn: what is found is certain."""
    del params, sampler, key
    text = _with_what_came(state, last)
    end = last.positions[:, None]
    place = jnp.arange(text.shape[1])[None]
    run = jnp.where(place < end, self._run(text, end), 0)
    # The longest, and of those of a length the last.
    best = jnp.argmax(run * text.shape[1] + place * (run > 0), axis=1)[:, None]
    ahead = jnp.arange(self.k)[None] % jnp.maximum(end - best, 1)
    tokens = jnp.take_along_axis(text, best + 1 + ahead, axis=1)
    is_found = (run.max(axis=1) >= self.config.least) & ~last.is_done
    return Guess(tokens, None, is_found, text)

  def _run(
      self, text: Int[Array, "B L"], end: Int[Array, "B 1"]
  ) -> Int[Array, "B L"]:
    """How many tokens up to each place are those at the text's end."""
    place = jnp.arange(text.shape[1])[None]
    run = jnp.zeros(text.shape, jnp.int32)
    for back in range(self.config.n):
      wanted = jnp.take_along_axis(text, jnp.maximum(end - back, 0), axis=1)
      is_same = (jnp.roll(text, back, axis=1) == wanted) & (place >= back)
      run += is_same & (run == back) & (end >= back)
    return run


@dataclasses.dataclass(frozen=True)
class OfModel:
  """Guesses what another model says. State: its caches, a layer each.

  These keep everything: what they hold of guesses that did not stay is written
  over by what comes, and no query stands behind it.

  Attributes:
    config: k.
    model: The other model.
  """

  config: draft_config.Model
  model: models.Transformer

  @property
  def k(self) -> int:
    """S."""
    return self.config.k

  def check(
      self, config: configs.TransformerConfig, num_positions: int
  ) -> None:
    """Both models must have the same tokens, and room for the text."""
    own = self.model.config
    if own.vocab_size != config.vocab_size:
      raise errors.UserError(
          f"the draft's model has {own.vocab_size} tokens and the model"
          f" {config.vocab_size}: a draft must speak in the model's tokens."
      )
    if any(layer_hooks.of_layer(own, n).systems for n in range(own.num_layers)):
      raise errors.UserError(
          f"the draft's model has attention={','.join(own.attention)}: a draft"
          " must attend by softmax, with a cache that keeps everything."
      )
    absolute.check_learned_positions(own, num_positions)

  def begin(
      self,
      params: PyTree,
      prompts: prompt_ids.Prompts,
      num_positions: int,
  ) -> PyTree:
    """Reads the prompts."""
    caches = generate.empty_caches(self.model, len(prompts), num_positions + 1)
    steps = generate.stream(
        self.model,
        params,
        prompts,
        max_new_tokens=1,
        kv_cache=caches,
        donate_cache=True,
    )
    next(steps)
    assert steps.last is not None  # It has just read.
    return steps.last.kv_cache

  def guess(
      self,
      params: PyTree,
      state: PyTree,
      last: round_lib.Round,
      sampler: sampling_config.SamplingConfig,
      key: Array,
  ) -> Guess:
    """One step more than guesses, which takes in the last of them."""
    is_greedy = sampling.is_greedy(sampler)

    def step(
        carry: tuple[Array, PyTree], at: Int[Array, ""]
    ) -> tuple[tuple[Array, PyTree], tuple[Array, Array | None]]:
      tokens, caches = carry
      positions = jnp.where(last.is_done, -1, last.positions + at)
      logits, caches = self.model.apply(
          {"params": params},
          tokens[:, None],
          positions=positions[:, None],
          kv_cache=caches,
      )
      drawn = sampling.draw(logits[:, 0], sampler, key, at)
      probs = None if is_greedy else sampling.probs(logits[:, 0], sampler)
      return (drawn, caches), (drawn, probs)

    (_, state), drawn = jax.lax.scan(
        step, (last.newest, state), jnp.arange(self.k + 1)
    )
    tokens, probs = jax.tree.map(lambda x: x[: self.k].swapaxes(0, 1), drawn)
    return Guess(tokens, probs, None, state)


def of(
    config: draft_config.NGram | draft_config.Model,
    model: models.Transformer | None = None,
) -> Draft:
  """Returns the draft of a config.

  Args:
    config: What a flag says.
    model: The other model, where the config is of one.

  Raises:
    UserError: If a model is wanted and there is none.
  """
  if isinstance(config, draft_config.NGram):
    return OfText(config)
  if model is None:
    raise errors.UserError("draft=model needs the model that is to guess.")
  return OfModel(config, model)


def _with_what_came(
    text: Int[Array, "B L"], last: round_lib.Round
) -> Int[Array, "B L"]:
  """Writes the tokens of the last round, up to the newest."""
  step = jnp.arange(last.came.shape[1])[None]
  index = (last.positions - last.counts)[:, None] + 1 + step
  index = jnp.where(step < last.counts[:, None], index, text.shape[1])
  rows = jnp.arange(len(text))[:, None]
  return text.at[rows, index].set(last.came, mode="drop")
