"""Runs of blocks over seeds and settings: one ensemble, one program.

`train` crosses settings with seeds, and lifts one run's start and steps to all
of them by `scansnap_jax.ensemble`. Letters as in `joma.block`.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses

import jax
from jaxtyping import Float, Int, PyTree
import numpy as np

from joma.block import observe as observe_lib
from joma.block import run as run_lib
from joma.block import train as train_lib
from scansnap_jax import ensemble
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True)
class BlockRuns:
  """Trained runs, leaves [settings, seeds, ...].

  Attributes:
    names: Of the settings.
    steps: Steps at which there are records [S].
    losses: Batch losses [settings, seeds, N].
    seen: Records, leaves [settings, seeds, S, ...].
    scores: What `score` returned, leaves [settings, seeds, times, ...].
  """

  names: tuple[str, ...]
  steps: Int[np.ndarray, "S"]
  losses: Float[np.ndarray, "_ R N"]
  seen: observe_lib.Observation
  scores: PyTree

  def __getitem__(self, name: str) -> observe_lib.Observation:
    """The records of one setting, leaves [seeds, S, ...]."""
    index = self.names.index(name)
    return jax.tree.map(lambda leaf: leaf[index], self.seen)

  def score_of(self, name: str) -> PyTree:
    """The scores of one setting, leaves [seeds, times, ...]."""
    index = self.names.index(name)
    return jax.tree.map(lambda leaf: leaf[index], self.scores)


def member(
    *,
    source: PyTree = (),
    lr_w: float,
    lr_z: float,
    lr_readout: float = 0.0,
    lr_u: float = 0.0,
    is_stationary: bool = False,
    activation: int = 0,
) -> run_lib.BlockRun:
  """One setting, its seed left at 0."""
  rates = (np.float32(rate) for rate in (lr_w, lr_z, lr_readout, lr_u))
  return run_lib.BlockRun(
      np.int32(0),
      np.bool_(is_stationary),
      np.int32(activation),
      source,
      *rates,
  )


def train(
    settings: Mapping[str, run_lib.BlockRun | Sequence[run_lib.BlockRun]],
    seeds: Sequence[int],
    *,
    setting: run_lib.BlockSetting,
    num_steps: int,
    num_records: int,
    score: Callable[..., PyTree] | None = None,
    num_scores: int = 1,
) -> BlockRuns:
  """Trains every setting with every seed.

  Args:
    settings: Name to member; or to one member for each seed.
    seeds: Seeds of data and initial values.
    setting: What all share.
    num_steps: N, a multiple of `num_records`.
    num_records: S - 1, a multiple of `num_scores`.
    score: A function (state, shared, *, setting) of a run, if anything is to be
      measured beside the records.
    num_scores: How often it is, at equal distances, after once at the start.

  Returns:
    The runs.

  Raises:
    UserError: A run could not take its first step, or is NaN or infinite.
  """
  rows = _with_seeds(settings, seeds)
  layout = ensemble.make_ensemble(len(rows))
  members = layout.scatter(jax.tree.map(lambda *x: np.stack(x), *rows))
  state = layout.map(run_lib.init, setting=setting)(members, ())
  every = num_steps // num_records
  spans = dict(num_steps=num_steps // num_scores, record_every=every)
  advance = layout.map(train_lib.train, setting=setting, **spans)
  measure = layout.map(score, setting=setting) if score else lambda *_: ()
  losses, seen, scores = _in_spans(layout, state, advance, measure, num_scores)
  split = lambda x: x.reshape(len(settings), len(seeds), *x.shape[1:])
  runs = BlockRuns(
      tuple(settings),
      every * np.arange(num_records + 1),
      split(np.concatenate(losses, axis=1)),
      jax.tree.map(lambda *parts: split(_join(parts)), *seen),
      jax.tree.map(lambda *parts: split(np.stack(parts, axis=1)), *scores),
  )
  _check(runs, members, seeds)
  return runs


def _in_spans(
    layout: ensemble.Ensemble,
    state: PyTree,
    advance: Callable[..., PyTree],
    measure: Callable[..., PyTree],
    num_spans: int,
) -> tuple[list[PyTree], list[PyTree], list[PyTree]]:
  """Losses, records and scores; one score more, from before the first span.

  In spans, so that nodes are scored on the way without a score in the compiled
  steps.
  """
  losses, seen, scores = [], [], [layout.gather(measure(state, ()))]
  for _ in range(num_spans):
    state, *observed = advance(state, ())
    more_losses, more_seen = layout.gather(observed)
    losses.append(more_losses)
    seen.append(more_seen)
    scores.append(layout.gather(measure(state, ())))
  return losses, seen, scores


def _check(
    runs: BlockRuns, members: run_lib.BlockRun, seeds: Sequence[int]
) -> None:
  """Raises UserError for runs that diverged.

  A late step that is not taken (`BlockSetting.max_attn_logit`) is a finding on
  exp attention. A run that cannot even take its first one has not trained, and
  every law would hold of it.
  """
  rates = (members.lr_w, members.lr_z, members.lr_readout, members.lr_u)
  trains = np.stack([np.asarray(r).ravel() for r in rates]).any(axis=0)
  of_runs = lambda leaf, fold: fold(leaf.reshape(*leaf.shape[:2], -1), axis=2)
  leaves = jax.tree.leaves(runs.seen)
  stays = [of_runs(leaf[:, :, 0] == leaf[:, :, 1], np.all) for leaf in leaves]
  is_stuck = np.all(stays, axis=0) & trains.reshape(-1, len(seeds))
  is_finite = of_runs(np.isfinite(runs.losses), np.all)
  bad = np.argwhere(is_stuck | ~is_finite)
  if len(bad):
    setting, seed = bad[0]
    raise errors.UserError(
        f"{len(bad)} of {is_stuck.size} runs diverged, {runs.names[setting]}"
        f" with seed {seeds[seed]} among them: their first step would have been"
        " too large, or their loss is NaN or infinite. Use smaller steps, in a"
        " new workdir."
    )


def _with_seeds(
    settings: Mapping[str, run_lib.BlockRun | Sequence[run_lib.BlockRun]],
    seeds: Sequence[int],
) -> list[run_lib.BlockRun]:
  """Crosses settings with seeds, settings outermost."""
  rows = []
  for runs in settings.values():
    each = [runs] * len(seeds) if isinstance(runs, run_lib.BlockRun) else runs
    rows += [
        run._replace(seed=np.int32(seed))
        for run, seed in zip(each, seeds, strict=True)
    ]
  return rows


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
  """Joins records [R, S, ...]; a part begins where the one before it ended."""
  # Every span records its start, which is the end of the one before.
  return np.concatenate(
      [parts[0], *(part[:, 1:] for part in parts[1:])], axis=1
  )
