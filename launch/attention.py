"""Runs one study of attention, of a system or a theory, from flags to a report.

  python -m launch.attention --study=positional --workdir=runs/positional

Each study holds a paper's claims of an attention system against small models
that it trains, or a theory of how attention learns against a computation that
does not use it, in minutes on a CPU; `--help` lists the studies with their
flags, which begin with the name of the study, as `--positional.rate`. Below
--workdir it writes report.html, with every claim expected beside measured,
summary.json (every number that the figure shows), figures/, metrics.jsonl,
flags.txt, config.json and parts/, what is done already. The same command
continues an interrupted run; --flagfile=OLD/flags.txt --workdir=NEW repeats
one.
"""

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
from launch.command import app
from launch.command import study_run

_STUDIES = {
    "act": act.STUDY,
    "adam_order": adam_order.STUDY,
    "bridge_checkpoint": bridge_checkpoint.STUDY,
    "bridge_ladder": bridge_ladder.STUDY,
    "composed": composed.STUDY,
    "conv": conv.STUDY,
    "deconstruct": deconstruct.STUDY,
    "dilution": dilution.STUDY,
    "dormant": dormant.STUDY,
    "drift": head_drift.STUDY,
    "in_context": in_context.STUDY,
    "incremental_rank": incremental_rank.STUDY,
    "induction": induction.STUDY,
    "flux": flux.STUDY,
    "grid": grid.STUDY,
    "length": length.STUDY,
    "loss_sparsity": loss_sparsity.STUDY,
    "max_margin": max_margin.STUDY,
    "memory": memory.STUDY,
    "moh": moh.STUDY,
    "monarch": monarch.STUDY,
    "mqar": mqar.STUDY,
    "nats": nats.STUDY,
    "pairs": pairs.STUDY,
    "pooling": pooling.STUDY,
    "positional": positional.STUDY,
    "random_features": random_features.STUDY,
    "recall": recall.STUDY,
    "retrieval": retrieval.STUDY,
    "reuse": reuse.STUDY,
    "selection": selection.STUDY,
    "sink_need": sink_need.STUDY,
    "sinks": sinks.STUDY,
    "update_rank": update_rank.STUDY,
}
_RUN = study_run.define("attention", "study", _STUDIES, "positional")


def main(_: list[str]) -> None:
  """Runs the study and writes the report."""
  _RUN()


if __name__ == "__main__":
  app.run(main)
