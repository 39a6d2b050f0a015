"""Runs one study of JoMA, from flags to a report.

  python -m launch.joma --preset=figure4 --workdir=runs/figure4

Each preset is one figure, theorem or open question of JoMA
(https://arxiv.org/abs/2310.00535); `--help` lists them with their flags. The
flags of a preset begin with the name of its study, as `--figure4.step_size`.
Below --workdir it writes report.html, summary.json (every number that the
figure shows), figures/, metrics.jsonl, flags.txt, config.json and, for studies
that train for long, checkpoints/. The same command continues an interrupted
run; --flagfile=OLD/flags.txt --workdir=NEW repeats one.
"""

from joma.hierarchy import config as table1_config
from joma.studies.figures import figure2
from joma.studies.figures import figure3
from joma.studies.figures import figure4
from joma.studies.figures import table1
from joma.studies.questions import bounce
from joma.studies.questions import drift
from joma.studies.questions import joint_invariant
from joma.studies.questions import linear_control
from joma.studies.questions import noisy_hblt
from joma.studies.questions import residual
from joma.studies.questions import two_layer_hblt
from joma.studies.theorems import convergence
from joma.studies.theorems import entropy_bounce
from joma.studies.theorems import erf
from joma.studies.theorems import hblt
from joma.studies.theorems import invariants
from joma.studies.theorems import stable_rank
from launch.command import app
from launch.command import run
from launch.command import study_run

_STUDIES = {
    "figure2": figure2.STUDY,
    "figure3": figure3.STUDY,
    "figure4": figure4.STUDY,
    "invariants": invariants.STUDY,
    "erf": erf.STUDY,
    "convergence": convergence.STUDY,
    "entropy_bounce": entropy_bounce.STUDY,
    "hblt": hblt.STUDY,
    "stable_rank": stable_rank.STUDY,
    "table1": table1.STUDY,
    "bounce": bounce.STUDY,
    "linear_control": linear_control.STUDY,
    "joint_invariant": joint_invariant.STUDY,
    "drift": drift.STUDY,
    "residual": residual.STUDY,
    "two_layer_hblt": two_layer_hblt.STUDY,
    "noisy_hblt": noisy_hblt.STUDY,
}
# Presets are the studies, and these with settings of their own.
_VARIANTS = {
    "table1_reduced": ("table1", table1_config.table1_reduced()),
    run.SMOKE: ("table1", table1_config.smoke()),
}

_RUN = study_run.define(
    "joma", "preset", _STUDIES, "figure4", variants=_VARIANTS, multihost=True
)


def main(_: list[str]) -> None:
  """Runs the study and writes the report."""
  _RUN()


if __name__ == "__main__":
  app.run(main)
