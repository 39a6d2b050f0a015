"""Small studies of theories: each run once, for all that is asked of it."""

import functools

from joma.studies.theories import adam_order
from joma.studies.theories import composed
from joma.studies.theories import dilution
from joma.studies.theories import dormant
from joma.studies.theories import in_context
from joma.studies.theories import incremental_rank
from joma.studies.theories import induction
from joma.studies.theories import loss_sparsity
from joma.studies.theories import max_margin
from joma.studies.theories import sink_need
from tests.joma.studies import smalls

STUDIES = {
    "adam_order": adam_order.STUDY,
    "composed": composed.STUDY,
    "dilution": dilution.STUDY,
    "dormant": dormant.STUDY,
    "in_context": in_context.STUDY,
    "incremental_rank": incremental_rank.STUDY,
    "induction": induction.STUDY,
    "loss_sparsity": loss_sparsity.STUDY,
    "max_margin": max_margin.STUDY,
    "sink_need": sink_need.STUDY,
}


@functools.cache
def measured(name):
  """The summary of a small study, as it is read back from summary.json."""
  return smalls.measured(STUDIES[name], STUDIES[name].smoke)


def drawn(name):
  """The figure of a small study, and all that it says."""
  return smalls.drawn(STUDIES[name], measured(name))
