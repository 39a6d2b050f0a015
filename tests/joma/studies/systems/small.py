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

_FEW = dict(num_seeds=2, num_steps=2, num_records=2)
STUDIES = {
    "act": (act.STUDY, dict(num_seeds=2, num_keys=16)),
    "conv": (
        conv.STUDY,
        dict(
            batch_size=2,
            seq_len=8,
            num_pairs=2,
            num_keys=4,
            num_values=4,
            width=8,
            **_FEW,
        ),
    ),
    "deconstruct": (
        deconstruct.STUDY,
        dict(
            forms=("standard", "no mixing"),
            batch_size=2,
            seq_len=4,
            width=8,
            **_FEW,
        ),
    ),
    "grid": (
        grid.STUDY,
        dict(batch_size=2, size=4, width=8, num_heads=2, num_test=4, **_FEW),
    ),
    "head_drift": (
        head_drift.STUDY,
        dict(
            num_planted=2,
            batch_size=2,
            num_values=4,
            span=2,
            num_layers=2,
            num_heads=2,
            width=8,
            num_update=2,
            num_test=4,
            **_FEW,
        ),
    ),
    "flux": (
        flux.STUDY,
        dict(
            num_tuned=2,
            batch_size=2,
            num_chains=1,
            num_symbols=3,
            window=5,
            width=16,
            num_test=4,
            **_FEW,
        ),
    ),
    "length": (
        length.STUDY,
        dict(
            batch_size=2,
            length=8,
            factors=(1, 2),
            num_parts=3,
            num_values=4,
            width=8,
            num_test=4,
            **_FEW,
        ),
    ),
    "memory": (
        memory.STUDY,
        dict(batch_size=2, size=4, pairs=(2, 6), **_FEW),
    ),
    "moh": (
        moh.STUDY,
        dict(
            batch_size=2,
            seq_len=6,
            num_symbols=3,
            width=4,
            num_test=2,
            num_keys=32,
            block=8,
            num_heads=4,
            **_FEW,
        ),
    ),
    "monarch": (
        monarch.STUDY,
        dict(
            shares=(0.4, 0.7),
            blocks=2,
            num_layers=1,
            width=16,
            num_steps=2,
            seq_len=8,
            batch_size=2,
            num_tune=1,
            num_texts=2,
            num_capture=2,
            predictor_rank=1,
            predictor_steps=1,
        ),
    ),
    "mqar": (
        mqar.STUDY,
        dict(
            models=("softmax + conv", "gated_conv"),
            batch_size=2,
            seq_len=8,
            num_pairs=2,
            num_keys=4,
            num_values=4,
            width=8,
            num_test=4,
            **_FEW,
        ),
    ),
    "nats": (
        nats.STUDY,
        dict(
            batch_size=2,
            chunk=2,
            num_chunks=3,
            num_needles=1,
            num_asked=1,
            num_symbols=2,
            width=8,
            num_test=4,
            **_FEW,
        ),
    ),
    "pairs": (
        pairs.STUDY,
        dict(
            batch_size=2,
            num_values=3,
            num_tokens=2,
            width=4,
            num_test=4,
            **_FEW,
        ),
    ),
    "pooling": (
        pooling.STUDY,
        dict(batch_size=4, num_tokens=2, width=4, num_latents=2, **_FEW),
    ),
    "positional": (
        positional.STUDY,
        dict(
            tasks=("sort",),
            num_inputs=4,
            width=8,
            batch_size=4,
            num_test=8,
            **_FEW,
        ),
    ),
    "recall": (
        recall.STUDY,
        dict(
            batch_size=2,
            num_names=2,
            num_relations=2,
            num_values=4,
            num_filler=1,
            num_layers=2,
            num_heads=2,
            width=8,
            num_random=1,
            **_FEW,
        ),
    ),
    "retrieval": (
        retrieval.STUDY,
        dict(
            num_facts=4,
            num_keys=16,
            num_values=4,
            width=8,
            chunk=2,
            budget=3,
            policies=("streaming_llm",),
            num_test=2,
            **_FEW,
        ),
    ),
    "reuse": (
        reuse.STUDY,
        dict(
            num_seeds=2,
            num_layers=4,
            width=16,
            num_steps=2,
            seq_len=24,
            batch_size=2,
            block=4,
            num_blocks=2,
            num_random=1,
            num_distil=1,
        ),
    ),
    "selection": (
        selection.STUDY,
        dict(num_seeds=2, near=(4,), num_keys=64, num_blocks=3, block=8),
    ),
    "random_features": (
        random_features.STUDY,
        dict(
            num_seeds=2,
            size=3,
            num_keys=4,
            num_heads=20,
            num_test=200,
            num_examples=(400,),
        ),
    ),
    "update_rank": (
        update_rank.STUDY,
        dict(
            num_seeds=2,
            depths=(1, 2),
            width=4,
            num_directions=3,
            rate=0.1,
            num_steps=400,
            num_records=40,
        ),
    ),
    "sinks": (
        sinks.STUDY,
        dict(
            models=("softmax", "decay 5"),
            batch_size=2,
            seq_len=6,
            vocab_size=6,
            width=8,
            **_FEW,
        ),
    ),
}


def _untrained(problem, seeds, *, schedule, rate, decay=0.0, start=None):
  drawn = start or [problem.init(jax.random.key(seed)) for seed in seeds]
  steps = np.arange(1, schedule.num_records + 1)
  # Falls as if it had learned.
  curve = np.broadcast_to(1.0 / steps, (len(seeds), len(steps)))
  return training.Trained(
      jax.tree.map(lambda *x: np.stack(x), *drawn),
      steps,
      losses=curve,
      scores=1 - curve,
      num_steps=np.full(len(seeds), schedule.num_steps),
  )


@functools.cache
def measured(name, is_trained=False):
  """The summary of a small study, as it is read back from summary.json."""
  train = training.train if is_trained else _untrained
  with mock.patch.object(training, "train", train):
    return smalls.measured(*STUDIES[name])


def drawn(name):
  """The figure of a small study, and all that it says."""
  return smalls.drawn(STUDIES[name][0], measured(name))
