"""Policies and budgets against RULER's tasks, a row as each setting ends.

The full cache goes first: a task that it fails is marked, and other policies
are not measured on it. All tasks are padded to the same sizes, so that a policy
and a budget are the same programs for all of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np

from joma.inference.cache import calls
from joma.inference.evaluation import evaluate_caches
from joma.inference.evaluation import evaluate_config
from joma.inference.evaluation import evaluate_grid
from joma.inference.evaluation.protocols import reading
from joma.inference.evaluation.protocols import saved_rows
from joma.inference.evaluation.ruler import hay
from joma.inference.evaluation.ruler import ruler_tasks
from joma.inference.evaluation.ruler import sample as sample_lib
from joma.inference.evaluation.ruler import scoring
from joma.inference.evaluation.ruler import written as written_lib
from joma.systems.cache_policies import names as policy_names
from joma.transformer import config as configs
from scansnap_jax.experiment import progress

Config = evaluate_config.EvaluateConfig
Row = dict[str, Any]
# Texts are padded to a multiple of so many tokens.
_PAD = 16


class Reader(NamedTuple):
  """Who reads: a model, and how its folder writes texts.

  Attributes:
    subject: The model with its tokenizer.
    writer: Encodes examples.
    eos_ids: Tokens that end an answer.
  """

  subject: evaluate_grid.Subject
  writer: written_lib.Writer
  eos_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Cell:
  """Examples of a task that are read with one setting after another.

  Attributes:
    task: Its name.
    length: Tokens of a text at most.
    depth: Of the needle in a heat map, else None.
    samples: A batch a seed.
    texts: Their ids.
  """

  task: str
  length: int
  depth: float | None
  samples: Sequence[Sequence[sample_lib.Sample]]
  texts: Sequence[Sequence[written_lib.Written]]

  def key(self, policy: str, budget: float) -> Row:
    """What makes a row this cell's with a policy and a budget."""
    return {
        "task": self.task,
        "length": self.length,
        "depth": self.depth,
        "policy": policy,
        "budget": budget,
    }


def measure(
    config: Config,
    reader: Reader,
    workdir: pathlib.Path | None = None,
    on_progress: Callable[[int], None] = lambda num_cells: None,
) -> dict[str, list[Row]]:
  """Reads all tasks with all policies and budgets.

  Args:
    config: Settings.
    reader: Who reads.
    workdir: Rows are kept there as they are measured, and what is there is not
      measured again; None keeps none.
    on_progress: Told how many tasks have been read since.

  Returns:
    `rows`, by task, policy and budget, and `map`, by the depth and length of a
    needle: `task`, `length`, `depth`, `policy`, `budget`, `scores` by text,
    `said`, `slots`, `seconds`.

  Raises:
    UserError: A text does not fit, or a policy cannot be.
  """
  saved = saved_rows.SavedRows(workdir, {})
  grid = _Grid(config, reader, saved, on_progress)
  ruler = config.ruler
  cells = [
      draw(config, reader.writer, name, config.length) for name in ruler.tasks()
  ]
  rows = grid.measure(cells, ruler.budgets)
  mapped, found = ruler.mapped(), []
  if mapped is not None:
    for length in ruler.lengths or (config.length,):
      cells = [
          draw(config, reader.writer, mapped, length, depth)
          for depth in ruler.depths
      ]
      found += grid.measure(cells, (ruler.map_budget,), skips=False)
  return {"rows": rows, "map": found}


def num_cells(config: Config) -> int:
  """Settings times tasks, as `on_progress` counts them."""
  ruler, others = config.ruler, len(config.all_policies()) - 1
  mapped = len(ruler.depths) * len(ruler.lengths or (0,))
  return (1 + others * len(ruler.budgets)) * len(ruler.tasks()) + (
      1 + others
  ) * mapped


def passes(config: Config, row: Row) -> bool:
  """Whether the full cache's score is one that policies can lose."""
  return float(np.mean(row["scores"])) >= config.ruler.passes


def draw(
    config: Config,
    writer: written_lib.Writer,
    task: str,
    length: int,
    depth: float | None = None,
) -> Cell:
  """Draws the examples of a task, the same for every setting.

  Args:
    config: Settings.
    writer: Counts and encodes.
    task: Its name.
    length: Tokens of a text at most.
    depth: Of the needle; None is anywhere.
  """
  drawer = ruler_tasks.drawer(task, hay.essay(config.ruler.essay), depth)
  samples = [
      [
          ruler_tasks.fitted(
              task,
              drawer,
              (config.first_seed + seed, number),
              length,
              writer.count,
          )
          for number in range(config.batch_size)
      ]
      for seed in range(config.num_seeds)
  ]
  texts = [[writer.write(sample) for sample in batch] for batch in samples]
  return Cell(task, length, depth, samples, texts)


@dataclasses.dataclass(frozen=True)
class _Caches:
  """Makes empty caches; equal ones are the same program's."""

  config: Config
  shape: configs.TransformerConfig
  policy: str

  def __call__(self, batch_size: int, slots: int) -> tuple[Any, ...]:
    return evaluate_caches.make(
        self.config, self.shape, self.policy, slots, batch_size
    )


class _Grid:
  """Cells against settings."""

  def __init__(
      self,
      config: Config,
      reader: Reader,
      saved: saved_rows.SavedRows,
      on_progress: Callable[[int], None],
  ):
    self._config, self._reader = config, reader
    self._saved, self._on_progress = saved, on_progress

  def measure(
      self,
      cells: Sequence[Cell],
      budgets: Sequence[float],
      *,
      skips: bool = True,
  ) -> list[Row]:
    """Returns the rows of cells; those of tasks that full fails are alone."""
    sizes = sizes_of(self._config, cells)
    full = policy_names.REFERENCE
    rows = [self._row(cell, full, 1.0, sizes) for cell in cells]
    for policy, budget in self._settings(budgets):
      for cell, row in zip(cells, tuple(rows), strict=False):
        if skips and not passes(self._config, row):
          self._on_progress(1)
          continue
        rows.append(self._row(cell, policy, budget, sizes))
    return rows

  def _settings(self, budgets: Sequence[float]) -> Iterator[tuple[str, float]]:
    _, *others = evaluate_caches.names_of(
        self._config, self._reader.subject.model.config
    )
    # What was asked for comes before what stands beside.
    others.sort(key=lambda name: name not in self._config.policies)
    for policy in others:
      for budget in sorted(set(budgets)):
        yield policy, budget

  def _row(
      self, cell: Cell, policy: str, budget: float, sizes: reading.Sizes
  ) -> Row:
    key = cell.key(policy, budget)
    row = self._saved.find(**key)
    if row is None:
      row = self._read(cell, key, sizes)
      self._saved.add(row, **key)
    self._on_progress(1)
    return key | row

  def _read(self, cell: Cell, key: Row, sizes: reading.Sizes) -> Row:
    config, subject = self._config, self._reader.subject
    how = setting(config, self._reader, sizes, key["policy"], key["budget"])
    started, said, scores = time.monotonic(), [], []
    for samples, texts in zip(cell.samples, cell.texts, strict=True):
      ids = reading.answer(
          how,
          subject.model,
          subject.params,
          texts,
          config.ruler.num_new(cell.task),
      )
      assert subject.tokenizer is not None
      said += [subject.tokenizer.decode(row) for row in ids]
      scores += [
          scoring.score(text, sample.answers, any_counts=sample.any_counts)
          for text, sample in zip(said[-len(ids) :], samples, strict=True)
      ]
    row = {
        "slots": reading.num_slots(config.protocol, key["budget"], sizes),
        "scores": scores,
        "said": said,
        "seconds": round(time.monotonic() - started, 2),
    }
    progress.say(_line(key | row))
    return row


def setting(
    config: Config,
    reader: Reader,
    sizes: reading.Sizes,
    policy: str,
    budget: float,
) -> reading.Setting:
  """Returns how texts of such sizes are read.

  Args:
    config: Settings.
    reader: Who reads.
    sizes: Of all texts.
    policy: Its name.
    budget: Share that stays.
  """
  shape = reader.subject.model.config
  sized = dataclasses.replace(config, length=sum(sizes))
  return reading.Setting(
      protocol=config.protocol,
      budget=budget,
      make_caches=_Caches(sized, shape, policy),
      sizes=sizes,
      eos_ids=reader.eos_ids,
      request=_request(reader, policy),
      scope=config.ruler.scope or "head",
  )


def _request(reader: Reader, policy: str) -> tuple[int, ...]:
  """Ids of what a policy that rehearses says between text and repetition."""
  request = calls.request(policy_names.parse(policy))
  tokenizer = reader.subject.tokenizer
  if request is None or tokenizer is None:
    return ()
  return tuple(tokenizer.encode(request, special=False).tolist())


def _line(row: Mapping[str, Any]) -> str:
  where = "" if row["depth"] is None else f" at depth {row['depth']:g}"
  where += f" of {row['length']}" if where else ""
  kept = "" if row["budget"] == 1 else f", {100 * row['budget']:g} % kept"
  mean = 100 * float(np.mean(row["scores"]))
  return (
      f"{row['task']}{where}, {row['policy']}{kept}: {mean:.1f}"
      f" in {row['seconds']:.1f} s"
  )


def sizes_of(config: Config, cells: Sequence[Cell]) -> reading.Sizes:
  """Returns the longest of everything: what all texts are padded to.

  Args:
    config: Settings.
    cells: That share programs.
  """
  texts = [t for cell in cells for batch in cell.texts for t in batch]
  padded = lambda sizes: -(-max(sizes) // _PAD) * _PAD
  return reading.Sizes(
      context=padded(len(text.context) for text in texts),
      question=padded(len(text.question) for text in texts),
      answer=max(config.ruler.num_new(cell.task) for cell in cells),
  )
