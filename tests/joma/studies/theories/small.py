"""Small studies of theories: each run once, for all that is asked of it."""

import functools

from joma.studies.theories import composed
from joma.studies.theories import dormant
from joma.studies.theories import in_context
from joma.studies.theories import incremental_rank
from joma.studies.theories import loss_sparsity
from joma.studies.theories import max_margin
from tests.joma.studies import smalls

STUDIES = {
    "composed": (
        composed.STUDY,
        dict(modulus=5, num_nodes=4, num_seeds=2, num_steps=4),
    ),
    "dormant": (dormant.STUDY, dict(num_seeds=2, end_time=1e3, num_times=9)),
    "in_context": (
        in_context.STUDY,
        dict(
            spectrum=(1.0, 0.5),
            num_examples=7,
            num_seeds=2,
            num_steps=4,
            num_records=2,
            batch_size=4,
            num_heads=4,
            start=0.1,
            flow_time=200.0,
        ),
    ),
    "incremental_rank": (
        incremental_rank.STUDY,
        dict(
            alphas=(0.3, 0.1),
            keys=(1.5, 1.0),
            values=(2.0, 1.0),
            num_seeds=2,
            num_inputs=16,
            num_tokens=3,
            num_steps=300,
        ),
    ),
    "loss_sparsity": (
        loss_sparsity.STUDY,
        dict(
            scales=(0.1, 1.0),
            num_seeds=2,
            num_inputs=4,
            num_tokens=3,
            width=4,
            num_steps=100,
        ),
    ),
    "max_margin": (
        max_margin.STUDY,
        dict(
            num_seeds=2,
            num_inputs=2,
            num_tokens=3,
            width=4,
            num_steps=300,
            num_pair_steps=400,
        ),
    ),
}


@functools.cache
def measured(name):
  """The summary of a small study, as it is read back from summary.json."""
  return smalls.measured(*STUDIES[name])


def drawn(name):
  """The figure of a small study, and all that it says."""
  return smalls.drawn(STUDIES[name][0], measured(name))
