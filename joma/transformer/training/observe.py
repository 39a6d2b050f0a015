"""What is looked at while a language model trains, and when.

Letters: L layers, N heads, T positions.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
from jaxtyping import Float, PyTree
import numpy as np

from joma.systems.probes import names as probe_names
from joma.systems.probes import read as named
from joma.systems.probes import update_rank
from joma.transformer import config as configs
from joma.transformer import probes as probes_lib
from joma.transformer.layers import scanning
from joma.transformer.text import batches as batches_lib
from joma.transformer.text import corpus as corpus_lib
from joma.transformer.training import init as init_lib
from joma.transformer.training import layouts
from joma.transformer.training import lm_config
from joma.transformer.training import lm_probes
from joma.transformer.training import lm_step
from scansnap_jax.experiment.errors import UserError


class Observation(NamedTuple):
  """What is read off the parameters at a row; None where it is not due.

  Attributes:
    probes: Of every layer.
    chunk_entropy: Of the attention on one sequence of the validation text,
      see `lm_config.LmConfig.entropy_chunk`.
    valid_loss: Mean over the validation text, in nats.
    attn_maps: Of one sequence of the training text.
    named: Of `lm_config.LmConfig.probes`, by the names of `Observer.named`;
      None where none is asked for.
  """

  probes: lm_probes.Probes
  chunk_entropy: Float[np.ndarray, "L"] | None
  valid_loss: Float[np.ndarray, ""] | None
  attn_maps: Float[np.ndarray, "L N T T"] | None
  named: dict[str, Float[np.ndarray, "L"]] | None = None


class Observer:
  """The compiled functions that look at a run, and the texts they read."""

  def __init__(
      self,
      layout: layouts.Layout,
      task: lm_step.Task,
      corpus: corpus_lib.Corpus,
      text: batches_lib.Batches,
      num_steps: int,
      on_map: Callable[[int, PyTree], None] | None = None,
  ):
    """Draws the texts.

    Args:
      layout: How parameters lie on devices.
      task: The run.
      corpus: Whose validation text is read.
      text: The training batches, one of which is mapped.
      num_steps: Steps of the run; the last one is always evaluated.
      on_map: Given the step and the parameters, on the host, at `map_steps`.

    Raises:
      UserError: The validation text has no such `entropy_chunk`.
    """
    config = task.config
    self._config, self._text, self._layout = config, text, layout
    self._num_steps, self._on_map = num_steps, on_map
    self.map_steps = tuple(s for s in config.map_steps if s <= num_steps)
    self._evaluate = layout.map(lm_step.evaluate, task=task)
    self._probe = layout.map(lm_probes.probe, task=task)
    self._entropy_of_first = layout.map(lm_probes.entropy_of_first, task=task)
    self._attn_maps = layout.map(lm_probes.attn_maps, task=task)
    self._names = tuple(
        name for name in config.probes if name != probe_names.OF_UPDATES
    )
    self._probe_by_name = layout.map(
        lm_probes.probe_by_name, task=task, names=self._names
    )
    # Of the seed alone: a run that continues compares with the same.
    self._start: PyTree = None
    if probe_names.OF_UPDATES in config.probes:
      make, model = init_lib.init_params, task.model
      start = layout.gather(layout.init(make, config=config, model=model))
      self._start = scanning.unstack(start)
    # As many rows as a training batch has, so that they fit the devices.
    rows = max(1, config.batch_size // layout.num_parts)
    self._valid = valid_batches(config, corpus, rows * layout.num_parts)
    self._chunk = _chunk(config, self._valid)

  def observe(self, params: PyTree, step: int) -> Observation:
    """Looks at the parameters after so many steps.

    Args:
      params: Parameters, laid out.
      step: Steps taken.

    Returns:
      What is due then, on the host.
    """
    config = self._config
    number = config.probe_batches or len(self._valid.weights)
    some = jax.tree.map(lambda leaf: leaf[:number], self._valid)
    probes = self._probe(params, some)
    chunk_entropy = valid_loss = attn_maps = None
    if self._chunk is not None:
      chunk_entropy = self._entropy_of_first(params, self._chunk)
    if step % config.eval_every == 0 or step == self._num_steps:
      valid_loss = self._evaluate(params, self._valid)
    if step in self.map_steps:
      attn_maps = self._map(params)
      if self._on_map is not None:
        self._on_map(step, self._layout.gather(params))
    seen = self._layout.gather(
        Observation(probes, chunk_entropy, valid_loss, attn_maps)
    )
    return _marked(seen, config.model)._replace(
        named=self._by_name(params, some)
    )

  def last_map(self, params: PyTree) -> Float[np.ndarray, "L N T T"] | None:
    """Looks at the map of a finished run's parameters, laid out.

    None where it is among `map_steps`, or no map is wanted.
    """
    if not self.map_steps or self._num_steps in self.map_steps:
      return None
    attn_maps = self._layout.gather(self._map(params))
    return probes_lib.marked(attn_maps, self._config.model)

  def _map(self, params: PyTree) -> Any:
    config = self._config
    return self._attn_maps(
        params, draw(self._text, config.seed, [config.map_batch])
    )

  @property
  def named(self) -> tuple[str, ...]:
    """Names of the curves of the probes that are asked for by name."""
    found = named.row_names(self._names)
    if self._start is not None:
      found += tuple(update_rank.of_params(self._start, self._start))
    return found

  def _by_name(
      self, params: PyTree, some: batches_lib.Batch
  ) -> dict[str, Float[np.ndarray, "L"]] | None:
    """What the named probes give, one number a layer."""
    if not self._config.probes:
      return None
    rows: dict[str, np.ndarray] = {}
    if self._names:
      sums = self._layout.gather(self._probe_by_name(params, some))
      means = probes_lib.marked_by_name(named.means(sums), self._config.model)
      rows |= named.rows(means)
    if self._start is not None:
      now = scanning.unstack(self._layout.gather(params))
      rows |= update_rank.of_params(now, self._start)
    return rows


def _marked(
    seen: Observation, config: configs.TransformerConfig
) -> Observation:
  """Puts NaN where a layer has no attention weights to look at."""
  mark: Any = lambda x: None if x is None else probes_lib.marked(x, config)
  # All but the stable rank: it is of parameters, which every layer has.
  probes = seen.probes._replace(
      entropy=mark(seen.probes.entropy),
      effective_support=mark(seen.probes.effective_support),
      sink_rate=mark(seen.probes.sink_rate),
  )
  return seen._replace(
      probes=probes,
      chunk_entropy=mark(seen.chunk_entropy),
      attn_maps=mark(seen.attn_maps),
  )


def draw(
    text: batches_lib.Batches, seed: int, steps: Sequence[int] | np.ndarray
) -> batches_lib.Batch:
  """The batches of some steps, leaves [steps, B, T]."""
  batches = [text.batch(seed, int(step)) for step in steps]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def valid_batches(
    config: lm_config.LmConfig, corpus: corpus_lib.Corpus, num_rows: int
) -> batches_lib.Batch:
  """The validation text as batches of so many rows, leaves [_, num_rows, T].

  It is cut as the papers' code cuts it, into `eval_batch_size` columns and
  these into rows of T; which rows are computed together does not matter.
  """
  text = batches_lib.evaluation(
      corpus.valid, batch_size=config.eval_batch_size, seq_len=config.seq_len
  )
  rows = jax.tree.map(lambda *leaves: np.concatenate(leaves), *text)
  return jax.tree.map(lambda leaf: split_evenly(leaf, num_rows), rows)


def _chunk(
    config: lm_config.LmConfig, valid: batches_lib.Batch
) -> batches_lib.Batch | None:
  """One sequence of the validation text, once for each row of a batch."""
  if config.entropy_chunk is None:
    return None
  rows = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), valid)
  # `valid_batches` puts the columns of a chunk beside each other.
  row = config.entropy_chunk * config.eval_batch_size
  num_known = int(rows.weights.any(axis=-1).sum())
  if row >= num_known:
    raise UserError(
        f"entropy_chunk={config.entropy_chunk} must be less than the"
        f" {math.ceil(num_known / config.eval_batch_size)} chunks of"
        f" seq_len={config.seq_len} tokens that the validation text has."
    )
  copies = valid.weights.shape[1]
  return jax.tree.map(
      lambda leaf: np.broadcast_to(leaf[row], (1, copies, leaf.shape[-1])), rows
  )


def split_evenly(leaf: np.ndarray, num_rows: int) -> np.ndarray:
  """Lays rows out as [ceil(rows / num_rows), num_rows, ...], 0 at the end."""
  num_chunks = math.ceil(len(leaf) / num_rows)
  missing = num_chunks * num_rows - len(leaf)
  padded = np.pad(leaf, ((0, missing), *((0, 0),) * (leaf.ndim - 1)))
  return padded.reshape(num_chunks, num_rows, *leaf.shape[1:])
