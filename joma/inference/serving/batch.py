"""A batch of rows: sequences join it when one is free, and leave when done.

A prompt is read alone, into a cache of one sequence, which is then put into a
row of the batch's. What prompts begin with in common may be read once
(`Batch.read`) and be gone on from any number of times.

Letters: B rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import PyTree
import numpy as np

from joma.inference import decode_steps
from joma.inference import generate
from joma.inference import prompt_ids
from joma.inference import sampling_config
from joma.inference.serving import rows as row_lib
from joma.transformer import model as models
from joma.transformer.rope import absolute
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

Prompt = Any  # A row of token ids.


@runtime_checkable
class MakeCaches(Protocol):
  """Makes empty caches, one a layer: `kv_cache.init` with its other arguments.

  All of them hold as many tokens, whatever the batch.
  """

  def __call__(self, *, batch_size: int) -> PyTree:
    """Returns those of so many sequences."""
    ...


class Prefix(NamedTuple):
  """What several prompts begin with, read once.

  Attributes:
    num_tokens: Of it.
    kv_cache: Of one sequence, after it.
  """

  num_tokens: int
  kv_cache: PyTree


class New(NamedTuple):
  """A token.

  Attributes:
    row: Whose.
    token: The token.
    is_last: Whether the sequence has ended with it.
  """

  row: int
  token: int
  is_last: bool


class Batch:
  """Rows, of which each is one sequence's or free.

  Attributes:
    kv_cache: Of all rows; of those that ended, until somebody joins.
    num_steps: So far.
  """

  def __init__(
      self,
      model: models.Transformer,
      params: PyTree,
      make_caches: MakeCaches,
      num_rows: int,
      *,
      sampler: sampling_config.SamplingConfig = sampling_config.GREEDY,
      eos_ids: tuple[int, ...] = (),
      prefill_chunk: int | None = None,
  ):
    """Starts with all rows free.

    Args:
      model: Of which `params` are.
      params: Of the model.
      make_caches: Makes caches of the batch, and of one sequence.
      num_rows: B.
      sampler: How tokens are chosen; each sequence draws as it would alone.
      eos_ids: Tokens that end a sequence.
      prefill_chunk: As in `generate.stream`.

    Raises:
      UserError: If a cache cannot follow one of the model's systems, or has
        what is not a row's own.
    """
    require.at_least("num_rows", num_rows, 1)
    make = lambda: make_caches(batch_size=num_rows)
    generate.check_follows(model, num_rows, make)
    _check_rows(make_caches, num_rows)
    self._model, self._params = model, params
    self._draws = {"sampler": sampler, "eos_ids": eos_ids}
    self._prefill_chunk = prefill_chunk
    self._one = make_caches(batch_size=1)
    self._rows = row_lib.empty(num_rows)
    self._free = list(range(num_rows))
    self.kv_cache = make()
    self.num_steps = 0

  @property
  def num_free(self) -> int:
    """Rows of nobody."""
    return len(self._free)

  @property
  def is_idle(self) -> bool:
    """Whether nobody is there."""
    return self.num_free == len(self._rows.tokens)

  def read(self, prompt: Prompt) -> Prefix:
    """Reads what prompts begin with.

    Of a cache that evicts, what stays of it is chosen at its end, before what
    follows is known.

    Raises:
      UserError: As `generate.stream`.
    """
    state = self._after(prompt, None, 1)
    return Prefix(len(prompt), state.kv_cache)

  def join(
      self, prompt: Prompt, max_new_tokens: int, prefix: Prefix | None = None
  ) -> New:
    """Gives a sequence the first free row; returns its first token.

    Args:
      prompt: Token ids; behind a prefix, those that follow it.
      max_new_tokens: At most so many, from 1.
      prefix: Of `read`, what goes before the prompt; it is copied.

    Raises:
      UserError: If no row is free; else as `generate.stream`.
    """
    if not self._free:
      raise errors.UserError(
          f"all {len(self._rows.tokens)} rows are taken: wait until a sequence"
          " ends, or let one leave."
      )
    require.at_least("max_new_tokens", max_new_tokens, 1)
    state = self._after(prompt, prefix, max_new_tokens)
    row = self._free[0]
    self._rows, self.kv_cache = row_lib.join(
        self._rows,
        self.kv_cache,
        np.int32(row),
        state,
        np.int32(max_new_tokens),
    )
    is_last = bool(state.is_done[0]) or max_new_tokens == 1
    if not is_last:
      self._free.remove(row)
    return New(row, int(state.tokens[0]), is_last)

  def step(self) -> list[New]:
    """Takes a step; returns the new token of each row that is taken.

    Raises:
      UserError: If a sequence's logits are not finite.
    """
    taken = [n for n in range(len(self._rows.tokens)) if n not in self._free]
    if not taken:
      return []
    self._rows, self.kv_cache = row_lib.step(
        self._model, self._params, self._rows, self.kv_cache, **self._draws
    )
    self.num_steps += 1
    rows = jax.tree.map(np.asarray, self._rows)
    generate.check_are_finite(rows.is_finite, self.num_steps, self.kv_cache)
    self._free = np.flatnonzero(rows.is_free).tolist()
    return [New(n, int(rows.tokens[n]), bool(rows.is_free[n])) for n in taken]

  def leave(self, row: int) -> None:
    """Ends a sequence before its time.

    Raises:
      UserError: If nobody is in that row.
    """
    if row in self._free or not 0 <= row < len(self._rows.tokens):
      raise errors.UserError(
          f"row={row}: no sequence is there that could leave."
      )
    self._rows = row_lib.leave(self._rows, np.int32(row))
    self._free = sorted([*self._free, row])

  def _after(
      self, prompt: Prompt, prefix: Prefix | None, max_new_tokens: int
  ) -> decode_steps.DecodeState:
    """Reads a prompt alone."""
    start = 0 if prefix is None else prefix.num_tokens
    length = int(prompt_ids.lengths_of([prompt], self._model.config)[0])
    num_positions = start + length + max_new_tokens - 1
    absolute.check_learned_positions(self._model.config, num_positions)
    generate.check_fits(self._one, num_positions)
    steps = generate.stream(
        self._model,
        self._params,
        [prompt],
        max_new_tokens=1,
        kv_cache=self._one if prefix is None else prefix.kv_cache,
        starts=[start],
        prefill_chunk=self._prefill_chunk,
        **self._draws,
    )
    next(steps)
    assert steps.last is not None  # It has just read.
    return steps.last


def _check_rows(make_caches: MakeCaches, num_rows: int) -> None:
  """Raises UserError unless all of a cache is [B, ...], one row a sequence."""
  of_size: Callable[[int], PyTree] = lambda size: jax.eval_shape(
      lambda: make_caches(batch_size=size)
  )
  for layer, (one, more) in enumerate(
      zip(of_size(1), of_size(num_rows + 1), strict=True)
  ):
    is_row = (
        lambda x, y: x.shape == (1, *y.shape[1:]) and len(y) == num_rows + 1
    )
    same = jax.tree.structure(one) == jax.tree.structure(more)
    if not same or not jax.tree.all(jax.tree.map(is_row, one, more)):
      raise errors.UserError(
          f"the cache of layer {layer}, {type(one).__name__}, has more than a"
          " row for each sequence, so that none can join a batch: decode its"
          " prompts together from the start."
      )
