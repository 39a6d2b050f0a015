"""Small studies of systems: each run once, for all that is asked of it.

Where nothing is said of training, which `training_test` is about, models stay
as they are drawn: to compile the steps of each would take the longest.
"""

import functools
from unittest import mock

import jax
import numpy as np

from joma.studies import training
from joma.studies.systems import act
from joma.studies.systems import conv
from joma.studies.systems import deconstruct
from joma.studies.systems import length
from joma.studies.systems import memory
from joma.studies.systems import mqar
from joma.studies.systems import positional
from joma.studies.systems import random_features
from joma.studies.systems import retrieval
from joma.studies.systems import reuse
from joma.studies.systems import selection
from joma.studies.systems import sinks
from joma.studies.systems.bridge import bridge_checkpoint
from joma.studies.systems.bridge import bridge_ladder
from joma.studies.systems.probes import head_drift
from joma.studies.systems.probes import recall
from joma.studies.systems.probes import update_rank
from joma.studies.systems.projections import monarch
from joma.studies.systems.readouts import grid
from joma.studies.systems.readouts import pairs
from joma.studies.systems.readouts import pooling
from joma.studies.systems.routing import flux
from joma.studies.systems.routing import moh
from joma.studies.systems.routing import nats
from tests.joma.studies import smalls

STUDIES = {
    "act": act.STUDY,
    "bridge_checkpoint": bridge_checkpoint.STUDY,
    "bridge_ladder": bridge_ladder.STUDY,
    "conv": conv.STUDY,
    "deconstruct": deconstruct.STUDY,
    "grid": grid.STUDY,
    "head_drift": head_drift.STUDY,
    "flux": flux.STUDY,
    "length": length.STUDY,
    "memory": memory.STUDY,
    "moh": moh.STUDY,
    "monarch": monarch.STUDY,
    "mqar": mqar.STUDY,
    "nats": nats.STUDY,
    "pairs": pairs.STUDY,
    "pooling": pooling.STUDY,
    "positional": positional.STUDY,
    "recall": recall.STUDY,
    "retrieval": retrieval.STUDY,
    "reuse": reuse.STUDY,
    "selection": selection.STUDY,
    "random_features": random_features.STUDY,
    "update_rank": update_rank.STUDY,
    "sinks": sinks.STUDY,
}


def _untrained(problem, seeds, *, schedule, rate, decay=0.0, start=None):
  drawn = start or [problem.init(jax.random.key(seed)) for seed in seeds]
  steps = np.arange(1, schedule.num_records + 1)
  # Falls as if it had learned.
  curve = np.broadcast_to(1.0 / steps, (len(seeds), len(steps)))
  score = jax.eval_shape(problem.loss, drawn[0], jax.random.key(0))[1]
  scores = np.multiply.outer(1 - curve, np.ones(score.shape))
  return training.Trained(
      jax.tree.map(lambda *x: np.stack(x), *drawn),
      steps,
      losses=curve,
      scores=scores,
      num_steps=np.full(len(seeds), schedule.num_steps),
  )


@functools.cache
def measured(name, is_trained=False):
  """The summary of a small study, as it is read back from summary.json."""
  train = training.train if is_trained else _untrained
  with mock.patch.object(training, "train", train):
    return smalls.measured(STUDIES[name], STUDIES[name].smoke)


def drawn(name):
  """The figure of a small study, and all that it says."""
  return smalls.drawn(STUDIES[name], measured(name))
