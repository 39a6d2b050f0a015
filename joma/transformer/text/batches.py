"""Batches of a token array as pure functions of seed and step.

There is no iterator to save: a run at step s has read the batches 0 to s - 1,
any step is reached at once, and however many processes share a batch, their
rows put together are the same. `RandomBatches` draws windows; in the layout of
`SequentialBatches`, which the runs of Scan & Snap and JoMA have, each row walks
through its own stretch of the text.

Letters: B batch, T positions.
"""

from collections.abc import Iterator
import dataclasses
import importlib
import operator
from typing import Any, NamedTuple, Protocol, SupportsIndex, runtime_checkable

from jaxtyping import Float, Int, Integer
import numpy as np

from scansnap_jax.experiment import require
from scansnap_jax.experiment.errors import UserError


class Batch(NamedTuple):
  """Input and what comes next; of positions with weight 0 nothing counts.

  Attributes:
    inputs: Token ids.
    targets: The id after each.
    weights: 1, or 0 at padding, which is at the end of rows and has id 0.
  """

  inputs: Int[np.ndarray, "B T"]
  targets: Int[np.ndarray, "B T"]
  weights: Float[np.ndarray, "B T"]


@runtime_checkable
class Batches(Protocol):
  """What both layouts offer."""

  @property
  def steps_per_epoch(self) -> int:
    """Steps in which the text is read once."""
    ...

  def batch(
      self,
      seed: int,
      step: SupportsIndex,
      process_index: int = 0,
      process_count: int = 1,
  ) -> Batch:
    """Returns the batch of a step, or the rows of one process."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class RandomBatches:
  """Windows that start anywhere in the text, drawn with replacement.

  Attributes:
    tokens: Token ids, in memory or mapped.
    batch_size: B over all processes.
    seq_len: T.

  Raises:
    UserError: The text has no T + 1 tokens.
  """

  tokens: Integer[np.ndarray, "_"]
  batch_size: int
  seq_len: int

  def __post_init__(self):
    _check_sizes(self.batch_size, self.seq_len)
    if len(self.tokens) <= self.seq_len:
      raise UserError(
          f"seq_len={self.seq_len} wants a text of more tokens than that, got"
          f" {len(self.tokens)}."
      )

  @property
  def steps_per_epoch(self) -> int:
    """Steps in which as many tokens are read as the text has."""
    return max(1, len(self.tokens) // (self.batch_size * self.seq_len))

  def batch(
      self,
      seed: int,
      step: SupportsIndex,
      process_index: int = 0,
      process_count: int = 1,
  ) -> Batch:
    """Returns a batch, or the rows of one process.

    Args:
      seed: From 0, below 2^64.
      step: From 0.
      process_index: Whose rows.
      process_count: Must divide B.

    Returns:
      B / process_count rows; their weights are 1.
    """
    rows = _rows(self.batch_size, process_index, process_count)
    # Raw bits of a counter: any step at once, and the same in any numpy.
    counter = np.array([0, 0, 0, operator.index(step)], np.uint64)
    bits = np.random.Philox(key=seed, counter=counter)
    num_starts = len(self.tokens) - self.seq_len
    starts = bits.random_raw(self.batch_size) % np.uint64(num_starts)
    window = starts[rows, None].astype(np.int64) + np.arange(self.seq_len + 1)
    ids = np.asarray(self.tokens[window]).astype(np.int32)
    weights = np.ones((len(ids), self.seq_len), np.float32)
    return Batch(ids[:, :-1], ids[:, 1:], weights)


@dataclasses.dataclass(frozen=True, eq=False)
class SequentialBatches:
  """Row b reads the b-th of B equal stretches of the text, T tokens a step.

  Tokens that do not fill B equal stretches are left out, at the end. The last
  batch of an epoch has what is left of each stretch, padded to T: every step
  has the same shape. At the next step the text starts again.

  On the 2,049,990 words of WikiText-2, B = 20 and T = 35, an epoch has 2,928
  full batches and one of 18 positions.

  Attributes:
    tokens: Token ids, in memory or mapped.
    batch_size: B over all processes.
    seq_len: T.

  Raises:
    UserError: The text has no two tokens a row.
  """

  tokens: Integer[np.ndarray, "_"]
  batch_size: int
  seq_len: int

  def __post_init__(self):
    _check_sizes(self.batch_size, self.seq_len)
    if self._stretch < 2:
      raise UserError(
          f"batch_size={self.batch_size} wants two tokens a row or more, got"
          f" {len(self.tokens)} tokens."
      )

  @property
  def _stretch(self) -> int:
    return len(self.tokens) // self.batch_size

  @property
  def steps_per_epoch(self) -> int:
    """Batches in which the text is read once, the short one included."""
    return -(-(self._stretch - 1) // self.seq_len)

  def batch(
      self,
      seed: int,
      step: SupportsIndex,
      process_index: int = 0,
      process_count: int = 1,
  ) -> Batch:
    """Returns a batch, or the rows of one process.

    Args:
      seed: Without effect: the order is that of the text.
      step: From 0, over epochs.
      process_index: Whose rows.
      process_count: Must divide B.

    Returns:
      B / process_count rows.
    """
    del seed
    rows = _rows(self.batch_size, process_index, process_count)
    first = operator.index(step) % self.steps_per_epoch * self.seq_len
    length = min(self.seq_len, self._stretch - 1 - first)
    table = self.tokens[: self.batch_size * self._stretch]
    table = table.reshape(self.batch_size, self._stretch)
    ids = np.asarray(table[rows, first : first + length + 1]).astype(np.int32)
    pad = lambda array: np.pad(array, ((0, 0), (0, self.seq_len - length)))
    weights = np.ones((len(ids), length), np.float32)
    return Batch(pad(ids[:, :-1]), pad(ids[:, 1:]), pad(weights))


def evaluation(
    tokens: Integer[np.ndarray, "_"], *, batch_size: int = 10, seq_len: int
) -> Iterator[Batch]:
  """Yields each token of a split once, in the sequential layout.

  Sums of weight times loss over sums of weight are the mean over the split.

  Args:
    tokens: Token ids.
    batch_size: B. At most B - 1 tokens at the end of the split are left out,
      and the first of each row is no target.
    seq_len: T.

  Raises:
    UserError: The split has no two tokens a row.
  """
  batches = SequentialBatches(tokens, batch_size, seq_len)
  return (batches.batch(0, step) for step in range(batches.steps_per_epoch))


def as_grain(
    batches: Batches,
    seed: int,
    num_steps: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Any:
  """Makes a `grain.MapDataset` whose element s is the batch of step s.

  `to_iter_dataset()` of it has a state to save, one number; shuffles, maps and
  mixtures of grain apply.

  Args:
    batches: Either layout.
    seed: As for `batch`.
    num_steps: Its length.
    process_index: As for `batch`.
    process_count: As for `batch`.

  Raises:
    UserError: grain is not installed.
  """
  try:
    # Imported here: an extra that training does without.
    grain = importlib.import_module("grain")
  except ImportError as error:
    raise UserError(
        "as_grain() needs grain: pip install 'scansnap-jax[data]'"
    ) from error
  source = _Source(batches, seed, num_steps, process_index, process_count)
  return grain.MapDataset.source(source)


@dataclasses.dataclass(frozen=True)
class _Source:
  """Batches with a length, which is what grain reads from."""

  batches: Batches
  seed: int
  num_steps: int
  process_index: int
  process_count: int

  def __len__(self) -> int:
    return self.num_steps

  def __getitem__(self, step: SupportsIndex) -> Batch:
    return self.batches.batch(
        self.seed, step, self.process_index, self.process_count
    )


def _check_sizes(batch_size: int, seq_len: int) -> None:
  require.at_least("batch_size", batch_size, 1)
  require.at_least("seq_len", seq_len, 1)


def _rows(batch_size: int, process_index: int, process_count: int) -> slice:
  """The rows of one process: equal shares in the order of the processes."""
  require.at_least("process_count", process_count, 1)
  require.between("process_index", process_index, 0, process_count - 1)
  if batch_size % process_count:
    raise UserError(
        f"batch_size={batch_size} must be a multiple of the"
        f" {process_count} processes that share it."
    )
  share = batch_size // process_count
  return slice(process_index * share, (process_index + 1) * share)
