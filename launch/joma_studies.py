"""The studies of JoMA by name: what each measures and how it is drawn."""

from collections.abc import Callable, Mapping
import functools
import pathlib
from typing import Any, NamedTuple

from matplotlib import figure as mpl_figure

from joma.hierarchy import config as table1_config
from joma.hierarchy import train
from joma.studies import bounce
from joma.studies import convergence
from joma.studies import drift
from joma.studies import entropy_bounce
from joma.studies import erf
from joma.studies import figure2
from joma.studies import figure3
from joma.studies import figure4
from joma.studies import hblt
from joma.studies import invariants
from joma.studies import joint_invariant
from joma.studies import linear_control
from joma.studies import noisy_hblt
from joma.studies import residual
from joma.studies import stable_rank
from joma.studies import table1
from joma.studies import two_layer_hblt
from launch import plot_joma
from launch import plot_joma_questions
from launch import plot_joma_table1
from scansnap_jax.experiment import devices
from scansnap_jax.experiment import metric_stream
from scansnap_jax.experiment import progress


class Study(NamedTuple):
  """What a study is made of.

  Attributes:
    title: Of its section in the report.
    measure: Settings and the run's folder, where metrics.jsonl and checkpoints
      go, to the summary: every number that the figure shows.
    draw: Summary, as summary.json has it, to figure.
    caption: What the figure shows.
  """

  title: str
  measure: Callable[[Any, pathlib.Path], dict[str, Any]]
  draw: Callable[[Mapping[str, Any]], mpl_figure.Figure]
  caption: str


def _study(
    title: str, module: Any, plots: Any, measure: Any = None
) -> tuple[str, Study]:
  """A study under the name of its module, which its figure has too."""
  name = module.__name__.rpartition(".")[2]
  measure = measure or functools.partial(_measure, name, module.measure)
  return name, Study(title, measure, getattr(plots, name), plots.CAPTIONS[name])


def _measure(
    name: str, measure: Any, config: Any, workdir: pathlib.Path
) -> dict[str, Any]:
  """Measures from the start, in a minute or so, and streams metric rows."""
  if not devices.is_main_process():
    return measure(config)
  with metric_stream.MetricStream(
      workdir / "metrics.jsonl", resume_below=None, tags={"experiment": name}
  ) as stream:
    return measure(config, on_metrics=stream.write)


def _measure_table1(
    config: table1_config.Table1Config, workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains from the last checkpoint on."""
  with progress.bar(
      "table1", num_runs=config.num_runs, steps_per_run=config.num_steps
  ) as on_progress:
    results = train.train_and_evaluate(config, workdir, on_progress=on_progress)
  return table1.summarize(config, results)


STUDIES: dict[str, Study] = dict([
    _study("Figure 2: attention logits follow the MLP", figure2, plot_joma),
    _study("Figure 3: lower MLP weights along training", figure3, plot_joma),
    _study("Figure 4: attention gets sparse, then dense", figure4, plot_joma),
    _study(
        "Table 1: hidden nodes and the latents of a hierarchy",
        table1,
        plot_joma_table1,
        _measure_table1,
    ),
    _study("Theorem 1: joint invariants", invariants, plot_joma),
    _study("Theorem 2: the erf relation", erf, plot_joma),
    _study("Theorem 4: salient components first", convergence, plot_joma),
    _study("Attention entropy falls, then rises", entropy_bounce, plot_joma),
    _study("Theorem 5: tokens that co-occur", hblt, plot_joma),
    _study("Stable rank of the lower MLP layer", stable_rank, plot_joma),
    _study(
        "Open question: does attention entropy bounce in training?",
        bounce,
        plot_joma_questions,
    ),
    _study(
        "Open question: the control with a linear activation",
        linear_control,
        plot_joma_questions,
    ),
    _study(
        "Open question: the invariant under joint training",
        joint_invariant,
        plot_joma_questions,
    ),
    _study(
        "Open question: drift of mean attention", drift, plot_joma_questions
    ),
    _study(
        "Open question: with and without the residual",
        residual,
        plot_joma_questions,
    ),
    _study(
        "Open question: two layers on a latent tree",
        two_layer_hblt,
        plot_joma_questions,
    ),
    _study(
        "Open question: latent trees with noise",
        noisy_hblt,
        plot_joma_questions,
    ),
])
