"""Several prompts into one cache, each after what has been said before.

A token that was drawn is taken in when the next one is asked for: the last one
of an answer waits, and goes before the next prompt.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxtyping import PyTree
import numpy as np

from joma.inference import generate
from joma.transformer import hooks
from joma.transformer import model as models
from scansnap_jax.experiment import errors


class Conversation:
  """Prompts and answers of one sequence."""

  def __init__(
      self,
      model: models.Transformer,
      params: PyTree,
      kv_cache: PyTree,
      **options: Any,
  ):
    """Starts with nothing said.

    Args:
      model: Of which `params` are.
      params: Of the model.
      kv_cache: Empty, a cache a layer, of one sequence.
      **options: Of `generate.stream`: `sampler`, `eos_ids`, `prefill_chunk`.
    """
    self._model = model
    self._params = params
    self._kv_cache = kv_cache
    self._options = options
    # Drawn, but not taken in.
    self._waiting: list[int] = []
    self._position = 0

  @property
  def num_taken_in(self) -> int:
    """Tokens that the cache has read."""
    return self._position

  @property
  def waiting(self) -> tuple[int, ...]:
    """The last token of an answer, which goes before the next prompt."""
    return tuple(self._waiting)

  @property
  def kv_cache(self) -> PyTree:
    """Of all that was taken in."""
    return self._kv_cache

  def forget_waiting(self) -> None:
    """Lets the next prompt come in the place of what waits."""
    self._waiting = []

  def has_room(self, num_tokens: int) -> bool:
    """Whether so many more tokens fit into caches that nothing leaves."""
    needed = self._position + len(self._waiting) + num_tokens
    sizes = [
        cache.num_positions()
        for cache in self._kv_cache
        if isinstance(cache, hooks.Bounded)
    ]
    return all(size is None or size >= needed for size in sizes)

  def say(
      self, prompt: Sequence[int] | np.ndarray, max_new_tokens: int
  ) -> Iterator[int]:
    """Reads a prompt and yields the answer's tokens as they come.

    Whoever leaves before the end may go on: the tokens that were yielded are
    part of what was said.

    Args:
      prompt: Token ids.
      max_new_tokens: Of the answer, at most.

    Raises:
      UserError: As `generate.stream`; what was said before stays.
    """
    if not self._waiting and not len(prompt):
      raise errors.UserError("There is nothing to answer: say something.")
    steps = generate.stream(
        self._model,
        self._params,
        [[*self._waiting, *np.asarray(prompt).tolist()]],
        max_new_tokens=max_new_tokens,
        kv_cache=self._kv_cache,
        starts=[self._position],
        donate_cache=True,
        **self._options,
    )
    return self._follow(steps)

  def _follow(self, steps: generate.Steps) -> Iterator[int]:
    try:
      for tokens, _ in steps:
        yield int(tokens[0])
    finally:
      state = steps.last
      if state is not None:
        self._kv_cache = state.kv_cache
        self._position = int(state.positions[0])
        # Left in the middle, the newest token has been shown to nobody.
        shown = steps.is_last_shown
        self._waiting = [int(state.tokens[0])] if shown else []
