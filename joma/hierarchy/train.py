"""The training loop of Table 1: all seeds of a cell at once, cell by cell.

The padding that all sequences of a cell begin with is merged into one token,
and each class is computed once; see model.py and run.py.
A batch is a pure function of (seed, step), so a restart needs the step alone.

Letters as in `joma.hierarchy`.
"""

from collections.abc import Callable
import itertools
import pathlib
from typing import Any, NamedTuple

import jax
from jaxtyping import Float, Int, PyTree
import numpy as np

from joma.hierarchy import config as config_lib
from joma.hierarchy import data
from joma.hierarchy import model as hierarchy_model
from joma.hierarchy import run
from joma.hierarchy import scores as hierarchy_scores
from scansnap_jax import ensemble
from scansnap_jax.experiment import loop
from scansnap_jax.experiment.processes import preemption

_SCORES = hierarchy_scores.Scores._fields


class Cell(NamedTuple):
  """A cell of the table.

  Attributes:
    num_classes: K, the paper's C.
    num_combinations: N_ch.
    num_latents: Of level 0 and level 1.
  """

  num_classes: int
  num_combinations: int
  num_latents: tuple[int, int]

  @property
  def name(self) -> str:
    """Such as `C=20,N_ch=2,latents=10+20`."""
    latents = "+".join(map(str, self.num_latents))
    return (
        f"C={self.num_classes},N_ch={self.num_combinations},latents={latents}"
    )


class History(NamedTuple):
  """What was recorded of all runs; NaN where it is still to come.

  Attributes:
    losses: Batch loss before each update.
    accuracy: At each evaluation, the first one before training.
    scores: For each level, the classes last: leaves [R, E, N].
  """

  losses: Float[np.ndarray, "R num_steps"]
  accuracy: Float[np.ndarray, "R E"]
  scores: tuple[hierarchy_scores.Scores, ...]


class Result(NamedTuple):
  """The runs of one cell.

  Attributes:
    cell: Which.
    seeds: [R].
    hierarchies: One a run.
    steps: Steps of the evaluations, [E], from 0 to num_steps.
    history: What was recorded.
    params: Final parameters, leaves [R, ...].
  """

  cell: Cell
  seeds: np.ndarray
  hierarchies: list[data.Hierarchy]
  steps: np.ndarray
  history: History
  params: PyTree


def train_and_evaluate(
    config: config_lib.Table1Config,
    workdir: pathlib.Path,
    *,
    experiment: str = "table1",
    on_progress: Callable[[int], None] = lambda num_run_steps: None,
) -> list[Result]:
  """Trains and evaluates every run of the table, from its last checkpoint on.

  Args:
    config: The table.
    workdir: Where `metrics.jsonl` and `checkpoints/` go.
    experiment: Its name in metric rows, folders and errors.
    on_progress: Told how many steps of single runs have been taken since.

  Returns:
    One result per cell.

  Raises:
    UserError: If a run diverges, or the checkpoints are of another config.
    Stopped: If SIGTERM or Ctrl-C asked to stop; the state has been saved.
  """
  seeds = np.arange(config.num_seeds, dtype=np.int32) + config.first_seed
  layout = ensemble.make_ensemble(len(seeds))
  schedule = loop.make_schedule(config)
  results = []
  with preemption.stop_requests() as stop_requested:
    for cell in make_cells(config):
      hierarchies = [make_hierarchy(config, cell, int(seed)) for seed in seeds]
      members = layout.scatter(make_runs(config, seeds, hierarchies))
      model = make_model(config, cell.num_classes)
      init = layout.map(run.init, model=model)
      with _make_recorder(config, workdir, experiment, cell) as recorder:
        start, state, history = loop.resume(
            *(recorder, layout, init, (members, ())),
            _start_history(config, cell),
        )
        on_progress(start * len(seeds))
        for interval in schedule.intervals(start):
          train = _compile(config, layout, model, len(interval.steps))
          state, *seen = train(state, ())
          losses, (before, after) = layout.gather(seen)
          history.losses[:, interval.steps] = losses
          is_finite = layout.is_finite(after)
          recorder.check_finite(interval, history.losses, is_finite)
          if interval.start == 0:
            _record(history, before, 0)
            recorder.write(0, _rows(hierarchies, seeds, before))
          _record(history, after, interval.evaluation)
          rows = _rows(hierarchies, seeds, after)
          recorder.write(interval.end, rows, losses[:, -1])
          on_progress(len(interval.steps) * len(seeds))
          stop = preemption.on_any_process(stop_requested())
          if stop or interval.is_saved:
            loop.save(recorder, layout, interval, state, history)
          if stop:
            recorder.stop(interval, config.num_steps)
      steps, params = schedule.evaluation_steps, layout.gather(state.params)
      results.append(Result(cell, seeds, hierarchies, steps, history, params))
  return results


def _make_recorder(
    config: config_lib.Table1Config,
    workdir: pathlib.Path,
    experiment: str,
    cell: Cell,
) -> loop.Recorder:
  seeds = range(config.first_seed, config.first_seed + config.num_seeds)
  return loop.Recorder(
      workdir,
      f"{experiment}/{cell.name}",
      tags={"experiment": experiment, "cell": cell.name},
      runs=[f"seed={seed}, lr={config.lr:g}" for seed in seeds],
      rates="lr",
  )


def _compile(
    config: config_lib.Table1Config,
    layout: ensemble.Ensemble,
    model: hierarchy_model.HierarchyTransformer,
    num_steps: int,
) -> Callable[..., Any]:
  """The program of an interval; of equal ones it is compiled once."""
  return layout.map(
      run.train,
      donate=True,
      model=model,
      batch_size=config.batch_size,
      num_steps=num_steps,
      num_shuffles=config.num_shuffles,
  )


def make_cells(config: config_lib.Table1Config) -> list[Cell]:
  """Lists the cells, num_classes outermost."""
  pairs = zip(config.num_latents_0, config.num_latents_1, strict=True)
  axes = (config.num_classes, config.num_combinations, pairs)
  return [Cell(*values) for values in itertools.product(*axes)]


def make_hierarchy(
    config: config_lib.Table1Config, cell: Cell, seed: int
) -> data.Hierarchy:
  """Draws the hierarchy of a seed."""
  return data.make_hierarchy(
      seed,
      num_tokens=config.num_tokens,
      num_latents=(*cell.num_latents, cell.num_classes),
      set_sizes=(cell.num_combinations,) * 3,
  )


def make_model(
    config: config_lib.Table1Config, num_classes: int
) -> hierarchy_model.HierarchyTransformer:
  """The Transformer of a cell."""
  return hierarchy_model.HierarchyTransformer(
      config.num_tokens,
      num_classes,
      num_layers=config.num_layers,
      embed_dim=config.embed_dim,
      hidden_dim=config.hidden_multiple * config.num_tokens,
  )


def make_runs(
    config: config_lib.Table1Config,
    seeds: np.ndarray,
    hierarchies: list[data.Hierarchy],
) -> run.TableRun:
  """The runs of a cell on the host, leaves [R, ...], with merged padding."""
  runs = [
      _make_run(config, seed, one)
      for seed, one in zip(seeds, hierarchies, strict=True)
  ]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *runs)


def _make_run(
    config: config_lib.Table1Config, seed: np.int32, one: data.Hierarchy
) -> run.TableRun:
  unseen = data.unseen_classes(int(seed), one, config.num_unseen)
  # Every seed has the same shapes, and one program serves all.
  num_missing = config.num_unseen - len(unseen)  # Filled up with weight 0.
  filled = np.concatenate([unseen, one.members[-1][:1].repeat(num_missing, 0)])
  weights = np.arange(config.num_unseen) < len(unseen)
  write = lambda is_present: data.merge_padding(
      data.to_tokens(is_present, config.seq_len), one.max_tokens
  )
  tokens, num_padding = write(one.is_present)
  no_class = np.zeros((config.num_unseen, one.num_classes), bool)
  return run.TableRun(
      seed=seed,
      lr=np.float32(config.lr),
      weight_decay=np.float32(config.weight_decay),
      tokens=tokens,
      num_padding=np.int32(num_padding),
      latents=run.Latents(
          activity=one.activity,
          unseen_tokens=write(one.tokens_of(filled))[0],
          unseen_activity=(*one.expand(filled), no_class),
          unseen_weights=(weights / max(1, weights.sum())).astype(np.float32),
      ),
  )


def _start_history(config: config_lib.Table1Config, cell: Cell) -> History:
  num_evaluations = len(loop.make_schedule(config).evaluation_steps)
  empty = lambda *shape: np.full((config.num_seeds, *shape), np.nan, np.float32)
  levels = (*cell.num_latents, cell.num_classes)
  return History(
      losses=empty(config.num_steps),
      accuracy=empty(num_evaluations),
      scores=tuple(
          hierarchy_scores.Scores(*(empty(num_evaluations, n) for _ in _SCORES))
          for n in levels
      ),
  )


def _record(history: History, seen: run.Observation, evaluation: int) -> None:
  """Keeps an evaluation of all runs."""

  def keep(recorded: np.ndarray, values: np.ndarray | jax.Array) -> None:
    recorded[:, evaluation] = values

  keep(history.accuracy, seen.accuracy)
  # `Scores` of the history and of an observation have the same leaves.
  jax.tree.map(keep, history.scores, seen.scores)


def _rows(
    hierarchies: list[data.Hierarchy],
    seeds: Int[np.ndarray, "R"],
    seen: run.Observation,
) -> list[dict[str, Any]]:
  """The metric rows of an evaluation, one a run."""
  rows = [
      {"seed": seed, "accuracy": accuracy}
      for seed, accuracy in zip(seeds, seen.accuracy, strict=True)
  ]
  for level, scores in enumerate(seen.scores):
    for row, one, own in zip(rows, hierarchies, scores.own, strict=True):
      # A latent that no class uses has no score of its own.
      row[f"score_{level}"] = own[one.is_used(level)].mean()
  return rows
