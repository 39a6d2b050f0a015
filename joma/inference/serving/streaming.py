"""Prompts to continuations, so many at a time: as `generate`, with few rows.

Letters: N prompts.
"""

from collections.abc import Iterator
import functools

from jaxtyping import PyTree
import numpy as np

from joma.inference import generate
from joma.inference import prompt_ids
from joma.inference import prompt_work
from joma.inference import sampling_config
from joma.inference.serving import batch as batches
from joma.inference.serving import queue
from joma.transformer import full_cache
from joma.transformer import model as models
from scansnap_jax.experiment import require

# Tokens in common that are worth being read by themselves.
_WORTH = 32


def stream(
    model: models.Transformer,
    params: PyTree,
    prompts: prompt_ids.Prompts,
    num_rows: int,
    make_caches: batches.MakeCaches | None = None,
    *,
    max_new_tokens: int,
    sampler: sampling_config.SamplingConfig = sampling_config.GREEDY,
    eos_ids: tuple[int, ...] = (),
    prefill_chunk: int | None = None,
) -> Iterator[generate.Shown]:
  """Yields (tokens, is_new), both [N], as `generate.stream` does.

  Each prompt is continued as it would be alone. What all prompts begin with is
  read once where nothing leaves the caches, so that nobody can tell.

  Args:
    model: Of which `params` are.
    params: Of the model.
    prompts: Token ids of each, of any lengths from 1.
    num_rows: Prompts that are continued at a time.
    make_caches: Makes caches of so many sequences; None keeps everything.
    max_new_tokens: Of each sequence, at most.
    sampler: How tokens are chosen, of each prompt as it would be alone.
    eos_ids: Tokens that end a sequence.
    prefill_chunk: As in `generate.stream`.

  Raises:
    UserError: As `batch.Batch` and `Batch.join`; of the arguments before
      anything is computed.
  """
  require.at_least("max_new_tokens", max_new_tokens, 1)
  lengths = prompt_ids.lengths_of(prompts, model.config)
  shared = 0
  if make_caches is None:
    num_positions = int(lengths.max()) + max_new_tokens
    capacity = prompt_work.capacity(
        model.config, num_rows, num_positions, model.dtype
    )
    make_caches = functools.partial(
        full_cache.init, model.config, capacity=capacity, dtype=model.dtype
    )
    shared = queue.shared_length(prompts)
  batch = batches.Batch(
      model,
      params,
      make_caches,
      num_rows,
      sampler=sampler,
      eos_ids=eos_ids,
      prefill_chunk=prefill_chunk,
  )
  if len(prompts) == 1 or shared < _WORTH:
    shared = 0
  return _shown(batch, prompts, shared, max_new_tokens)


def _shown(
    batch: batches.Batch,
    prompts: prompt_ids.Prompts,
    shared: int,
    max_new_tokens: int,
) -> Iterator[generate.Shown]:
  prefix = batch.read(prompts[0][:shared]) if shared else None
  requests = (
      queue.Request(prompt[shared:], max_new_tokens, prefix)
      for prompt in prompts
  )
  places = np.arange(len(prompts))
  for number, token in queue.serve(batch, requests):
    yield np.full(len(prompts), token, np.int32), places == number
