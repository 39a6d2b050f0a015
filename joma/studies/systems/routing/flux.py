"""Does a router of layers tell prompts apart, and does that pay?

Prompts are of two kinds by turns: needle prompts, whose answers are two links
away, both far, so that two layers must read far; and local ones, for which the
newest keys are enough. A model that reads everything is trained first; from it
go on a router with a target share of sparse layers
(https://arxiv.org/abs/2604.07394), whose multipliers rise while the target is
missed, and fixed plans with as many sparse layers. The router shall make both
layers full for the one kind and sparse for the other.

The figure shows right answers of both kinds, and the share of sparse layers.

Paper's settings: those of the system `flux`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from joma.studies import texts
  from joma.studies import training
  from joma.studies.systems.subjects import two_prompts
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

# Each layer's route: forced, or a target of the router's.
DENSE = "full, full"
MODELS: dict[str, tuple[str | float, ...]] = {
    "full, sparse": ("full", "sparse"),
    "sparse, full": ("sparse", "full"),
    "router, s* = .5": (0.5, 0.5),
    "router, s* = 0": (0.0, 0.0),
    "router, s* = 1": (1.0, 1.0),
}
_PLANS, _ROUTER = [*MODELS][:2], [*MODELS][2]
_KINDS = ("needle", "local")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FluxConfig:
  """Does a router of layers tell prompts apart, and does that pay?

  Attributes:
    num_seeds: Runs of each model.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Steps of the model that reads everything, a multiple of
      num_records.
    num_tuned: Steps of each that goes on from it, likewise.
    num_records: Records of each run.
    batch_size: Texts of a step.
    num_chains: Chains of two links of a needle text.
    num_symbols: Symbols of each kind.
    window: Keys that a sparse layer reads besides the first.
    width: Width of the residual stream, a multiple of 16.
    rate: Highest learning rate.
    cost: Multipliers before the router is trained.
    num_test: Texts of each kind by which a run is told.
  """

  num_seeds: int = 3
  first_seed: int = 0
  num_steps: int = 1000
  num_tuned: int = 200
  num_records: int = 20
  batch_size: int = 32
  num_chains: int = 3
  num_symbols: int = 8
  window: int = 8
  width: int = 64
  rate: float = 3e-3
  cost: float = 1.0
  num_test: int = 128

  def __post_init__(self):
    settings_lib.check_trained(self, "batch_size", "num_chains", "num_test")
    settings_lib.require_multiple("num_tuned", self.num_tuned, self.num_records)
    settings_lib.require_multiple("width", self.width, 16)
    require.between("num_symbols", self.num_symbols, self.num_chains, 10**4)
    # What a local text asks for lies within it.
    require.at_least("window", self.window, 5)
    require.not_negative("cost", self.cost)


def problem(
    config: FluxConfig, routes: tuple[str | float, ...], helps: bool = False
) -> texts.Learner:
  """A model whose layers have these routes, and its task.

  Args:
    config: Sizes.
    routes: Of the layers.
    helps: Whether texts help to learn the two links.
  """
  task = two_prompts.Prompts(
      num_chains=config.num_chains,
      num_symbols=config.num_symbols,
      window=config.window,
      helps=helps,
  )
  entries = tuple(
      two_prompts.entry(config.window, config.cost, route) for route in routes
  )
  return two_prompts.learner(task, entries, config.width, config.batch_size)


def measure(
    config: FluxConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains models that read everything, then the others from there.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", of each model: right answers of "needle" and "local" prompts,
    intervals over seeds and each seed's; of routers "auc" of the two kinds,
    "sparse", share of layers, and of each kind; "claims" and "finding".
  """
  part = part or parts.at_once
  of_seeds = [
      part(f"seed {seed}", lambda seed=seed: _of_seed(config, seed))
      for seed in settings_lib.seeds(config)
  ]
  rows = {
      name: {
          key: [run["rows"][name][key] for run in of_seeds]
          for key in of_seeds[0]["rows"][name]
      }
      for name in of_seeds[0]["rows"]
  }
  told = _claims(rows)
  return {
      "num_seeds": config.num_seeds,
      "guess": 1 / config.num_chains,
      "rows": rows,
      "claims": told,
      "finding": claims.finding(told),
  }


def _of_seed(config: FluxConfig, seed: int) -> dict[str, Any]:
  train = lambda what, steps, start=None: training.train(
      what,
      [seed],
      schedule=training.Schedule(
          num_steps=steps, num_records=config.num_records
      ),
      rate=config.rate,
      start=start,
  )
  dense = problem(config, ("full", "full"))
  learned = problem(config, ("full", "full"), helps=True)
  trained = train(learned, config.num_steps)
  known = trained.params_of(0)
  rows = {DENSE: _told(config, dense, known, seed)}
  for name, routes in MODELS.items():
    what = problem(config, routes)
    start = two_prompts.laid_over(what.init(jax.random.key(seed)), known)
    tuned = train(what, config.num_tuned, [start])
    rows[name] = _told(config, what, tuned.params_of(0), seed)
  return {"rows": rows, "steps": trained.steps, "curves": trained.curves()}


def _told(
    config: FluxConfig, what: texts.Learner, params: Any, seed: int
) -> dict[str, float]:
  """What one run does with new texts of both kinds."""
  look = jax.jit(two_prompts.look, static_argnums=(0, 3, 4))
  key = jax.random.key(seed + 2**30)  # No key of training.
  found, probs = {}, []
  for kind, name in enumerate(_KINDS):
    score, prob = look(what, params, key, kind, config.num_test)
    found[name] = float(score)
    if prob is not None:
      probs.append(np.asarray(prob))
      found[f"sparse, {name}"] = float((probs[-1] <= 0.5).mean())
  if not probs:
    return found
  needle, local = (prob.mean(axis=0) for prob in probs)
  return found | {
      "auc": two_prompts.auc(needle, local),
      "sparse": float((np.stack(probs) <= 0.5).mean()),
  }


def _claims(rows: dict[str, dict[str, list[float]]]) -> list[claims.Row]:
  span = lambda name, key: intervals.interval(
      np.array(rows[name][key]), least=0, most=1
  )
  text = lambda name, key: intervals.text(span(name, key))
  mean = lambda name, key: span(name, key)["mean"]
  told = [
      claims.row(
          f"{_ROUTER}: the router tells needle prompts from local ones",
          "area under the curve above .95",
          text(_ROUTER, "auc"),
          mean(_ROUTER, "auc") > 0.95,
      )
  ]
  for name in _PLANS:
    apart = {
        kind: intervals.interval(
            np.subtract(rows[_ROUTER][kind], rows[name][kind])
        )
        for kind in _KINDS
    }
    told.append(
        claims.row(
            f"a fixed plan with half of the layers sparse ({name}) answers less"
            f" than {_ROUTER} of one kind",
            "at least .1 fewer of one kind, and the interval over seeds"
            " above 0",
            ", ".join(f"{k} {intervals.text(x)}" for k, x in apart.items()),
            any(x["mean"] > 0.1 and x["low"] > 0 for x in apart.values()),
        )
    )
  for name, routes in [*MODELS.items()][2:]:
    told.append(
        claims.row(
            f"{name}: the target is reached",
            f"{routes[0]} of layers sparse, within .05",
            f"{text(name, 'sparse')}; right answers of needle prompts"
            f" {text(name, 'needle')}, local ones {text(name, 'local')}",
            abs(mean(name, "sparse") - float(routes[0])) <= 0.05,
        )
    )
  return told


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws right answers of both kinds; sparse layers of each beside."""
  rows = summary["rows"]
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.8)
    panels = figure.subplots(1, 2).tolist()
    looks = dict(zip(_KINDS, (drawing.WITH, drawing.WITHOUT), strict=True))
    routed = [name for name in rows if "sparse" in rows[name]]
    sides = (
        (panels[0], [*rows], "", "share of right answers"),
        (panels[1], routed, "sparse, ", "share of sparse layers"),
    )
    for axes, names, prefix, label in sides:
      x = np.arange(len(names), dtype=float)
      for kind, shift in zip(_KINDS, drawing.shifts(2), strict=True):
        spans = [
            intervals.interval(
                np.array(rows[name][prefix + kind]), least=0, most=1
            )
            for name in names
        ]
        look = looks[kind]._replace(linestyle="")
        points = drawing.points(spans)
        drawing.draw_points(axes, x + shift, points, look, kind)
      axes.set(ylabel=label, ylim=(-0.03, 1.03))
      axes.set_xticks(x, names, rotation=30, ha="right")
    panels[0].axhline(summary["guess"], color="black", linestyle=":")
    figures.put_legend_above(figure, figures.legend_entries(panels[0]))
  return figure


STUDY = study_lib.Study(
    title="Full or sparse by prompt",
    config=FluxConfig(),
    smoke=dict(
        num_tuned=2,
        batch_size=2,
        num_chains=1,
        num_symbols=3,
        window=5,
        width=16,
        num_test=4,
        num_seeds=2,
        num_steps=2,
        num_records=2,
    ),
    measure=study_lib.in_parts("flux", measure),
    draw=draw,
    caption=(
        "Left, share of right answers of needle and local prompts; dotted, a"
        " guess among the answers of a needle text. Right, share of layers that"
        " are sparse for each kind. Means over seeds and 95 % intervals"
        " (Student's t)."
    ),
    report_title="Attention systems",
)
