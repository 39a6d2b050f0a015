"""What does attention over a grid gain by knowing rows and columns?

Two marks lie k cells apart on a flattened grid: on one row, or behind its end
on the next. A bias by row and column tells the two (`grid_bias`, Astroformer,
https://arxiv.org/abs/2304.05350); one by distance on the flattened grid, the
twin, is the same for both. A [REG] token reads the class; models have no other
positions. A third model has a convolution over the grid in the place of its
first layer of attention (`grid_conv,grid_bias`), as Astroformer has them.

A [REG] token behind a word and a grid says the box of the colour that the word
names (TransVG, https://arxiv.org/abs/2104.08541), trained by L1 and GIoU; its
attention goes through the probes that all models' does, and is summed over the
word, the named box and the other one. It is trained with attention in both
layers, and with the convolution first.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import once
  from joma.studies import parts
  from joma.studies import texts
  from joma.studies import training
  from joma.studies.systems.subjects import grid_scenes
  from joma.systems.probes import drift
  from joma.systems.probes import read as read_lib
  from joma.systems.readouts import boxes
  from joma.transformer import config as configs
  from joma.transformer import model as models
  from joma.transformer import probes
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

BIASES = ("2-D bias", "1-D bias")
HYBRID = "convolution, 2-D bias"
MODELS = (*BIASES, HYBRID)
_OF_BOXES = (BIASES[0], HYBRID)
_PROBES = ("sinks", "concentration", "diversity", "local")
_IOU, _TIMES = 0.5, 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridConfig:
  """What does attention over a grid gain by knowing rows and columns?

  Attributes:
    num_seeds: Runs of each model.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Steps of a run, a multiple of num_records.
    num_records: Records of each run.
    batch_size: Grids of a step.
    size: Rows and columns, an even number.
    width: Width of the residual stream.
    num_heads: Heads of a layer.
    rate: Highest learning rate.
    num_test: Grids that answers and attention are measured on.
  """

  num_seeds: int = 3
  first_seed: int = 0
  num_steps: int = 600
  num_records: int = 12
  batch_size: int = 32
  size: int = 6
  width: int = 32
  num_heads: int = 4
  rate: float = 5e-3
  num_test: int = 512

  def __post_init__(self):
    settings_lib.check_trained(self, "batch_size", "num_heads", "num_test")
    require.at_least("size", self.size, 4)
    settings_lib.require_multiple("size", self.size, 2)
    settings_lib.require_multiple("width", self.width, self.num_heads)


def measure(
    config: GridConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains the models on marks, and [REG] on boxes.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows" of each model: "answers" of every seed on new grids, "scores" along
    training; "boxes", with and without the convolution: "iou" of every seed,
    "mass" of [REG]'s attention by layer of attention and role, and "probes",
    means over those layers; "steps", "guess", "claims" and "finding".
  """
  part = part or parts.at_once
  rows = {name: part(name, lambda n=name: _marks(config, n)) for name in MODELS}
  found = {
      name: part(f"boxes, {name}", lambda n=name: _boxes(config, n))
      for name in _OF_BOXES
  }
  told = _claims(rows, found)
  return {
      "rows": rows,
      "boxes": found,
      "steps": rows[HYBRID]["steps"],
      "guess": 0.5,
      "claims": told,
      "finding": claims.finding(told),
  }


def _attention(config: GridConfig, name: str, first: int) -> tuple[str, ...]:
  """Entries of the two layers; `first` is the position of the first cell."""
  size = config.size
  rows, columns = (1, size**2) if name == BIASES[1] else (size, size)
  grid = f"rows={rows}:columns={columns}:first={first}"
  below = "grid_conv" if name == HYBRID else "grid_bias"
  return f"{below}:{grid}", f"grid_bias:{grid}"


def _model(
    config: GridConfig, vocab_size: int, **options: Any
) -> configs.TransformerConfig:
  return configs.TransformerConfig(
      vocab_size=vocab_size,
      num_layers=2,
      embed_dim=config.width,
      num_heads=config.num_heads,
      num_kv_heads=config.num_heads,
      head_dim=config.width // config.num_heads,
      hidden_dim=4 * config.width,
      max_len=config.size**2 + 2,
      tie_embeddings=False,
      **options,
  )


def learner(config: GridConfig, name: str) -> texts.Learner:
  """One of the models, and grids with two marks."""
  task = grid_scenes.Marks(size=config.size)
  model = _model(
      config,
      task.vocab_size,
      positions="none",
      attention=_attention(config, name, 0),
  )
  return texts.Learner(model=model, task=task, batch_size=config.batch_size)


def _trained(config: GridConfig, problem: Any) -> training.Trained:
  return training.train(
      problem,
      settings_lib.seeds(config),
      schedule=training.Schedule(
          num_steps=config.num_steps, num_records=config.num_records
      ),
      rate=config.rate,
  )


def _marks(config: GridConfig, name: str) -> dict[str, Any]:
  one = learner(config, name)
  trained = _trained(config, one)
  test = one.task.draw(jax.random.key(10**6), config.num_test)

  def share(params: Any) -> jax.Array:
    logits: Any = one.transformer.apply({"params": params}, test.tokens)
    return one.measured(logits, test)[1]

  run = once.jit(lambda params: jax.lax.map(share, params))
  return {
      "answers": np.asarray(run(jax.device_put(trained.params))),
      "scores": intervals.interval(trained.scores, least=0, most=1),
      "steps": trained.steps,
      "curves": trained.curves(),
  }


def _boxes(config: GridConfig, name: str) -> dict[str, Any]:
  shape = _model(
      config,
      10,
      positions="learned",
      attention=_attention(config, name, 1),
  )
  problem = grid_scenes.Boxes(
      size=config.size,
      batch_size=config.batch_size,
      model=models.Transformer(shape, implementation="reference"),
  )
  trained = _trained(config, problem)
  scenes = problem.draw(jax.random.key(10**6), config.num_test)
  look = once.jit(lambda params: _look(problem, params, scenes))
  found = [
      jax.tree.map(np.asarray, look(jax.device_put(trained.params_of(run))))
      for run in range(config.num_seeds)
  ]
  named = [read_lib.rows(read_lib.means(sums)) for _, _, sums in found]
  return {
      "iou": [float(score) for score, _, _ in found],
      "mass": np.array([mass for _, mass, _ in found]),
      "probes": {
          name: float(np.mean([rows[name] for rows in named]))
          for name in named[0]
      },
      "steps": trained.steps,
      "curves": trained.curves(),
  }


def _look(
    problem: grid_scenes.Boxes, params: Any, scenes: grid_scenes.Scenes
) -> tuple[Any, Any, Any]:
  """Mean IoU, what [REG] reads of each role by layer, and the probes."""
  box, seen = problem.read(params, scenes.tokens)
  config, shape = problem.model.config, scenes.tokens.shape
  maps = [
      probes.weights_of(seen, layer, config, shape)
      for layer, entry in enumerate(config.attention)
      if entry.startswith("grid_bias")
  ]
  at = jnp.full(shape[0], shape[1] - 1)
  mass = [
      drift.role_mass(x, scenes.roles, at, grid_scenes.NUM_ROLES) for x in maps
  ]
  is_token = jnp.ones(shape, bool)
  sums = probes.by_name(_PROBES, seen, config, is_token)
  iou = boxes.iou(boxes.corners(box), boxes.corners(scenes.box))
  return iou.mean(), jnp.stack(mass).mean(axis=(1, 2)), sums


def _claims(
    rows: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]
) -> list[claims.Row]:
  share = lambda x: intervals.interval(np.array(x), least=0, most=1)
  text = lambda x: intervals.text(share(x))
  two, one, both = (np.array(rows[name]["answers"]) for name in MODELS)
  return [
      claims.row(
          "a bias by row and column tells marks on one row from marks on two",
          "above .95, every seed",
          text(two),
          two.min() > 0.95,
      ),
      claims.row(
          "a bias by distance on the flattened grid does not",
          ".95 or below, every seed",
          text(one),
          one.max() <= 0.95,
      ),
      claims.row(
          "a convolution in the place of the first layer of attention does no"
          " harm to that",
          "above .95, every seed",
          text(both),
          both.min() > 0.95,
      ),
      *_box_claims(text, *(found[name] for name in _OF_BOXES)),
  ]


def _box_claims(
    text: Callable[[Any], str], plain: dict[str, Any], hybrid: dict[str, Any]
) -> list[claims.Row]:
  mass = np.array(plain["mass"])[:, -1]
  named, other = mass[:, grid_scenes.NAMED], mass[:, grid_scenes.OTHER]
  iou, better = np.array(plain["iou"]), np.array(hybrid["iou"])
  gap = intervals.interval(better - iou)
  read = ", ".join(f"{k} {v:.3f}" for k, v in plain["probes"].items())
  return [
      claims.row(
          "[REG] says the box that the word names",
          f"mean intersection over union above {_IOU}, every seed",
          text(iou),
          iou.min() > _IOU,
      ),
      claims.row(
          "in the last layer [REG] reads the named box more than the other",
          f"{_TIMES:g} times its weight, mean over seeds",
          f"{text(named)} against {text(other)}; of all tokens, by the probes:"
          f" {read}",
          named.mean() > _TIMES * other.mean(),
      ),
      claims.row(
          "with the convolution first it says boxes better than with attention"
          " in both layers",
          "a gap whose interval over seeds is above 0",
          f"{intervals.text(gap)}: {text(better)} against {text(iou)}",
          gap["low"] > 0,
      ),
  ]


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws answers along training, and what [REG] reads."""
  looks, steps = drawing.looks_of(MODELS), np.asarray(summary["steps"])
  mass = np.asarray(summary["boxes"][BIASES[0]]["mass"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.4)
    left, right = figure.subplots(1, 2)
    for name in MODELS:
      scores = summary["rows"][name]["scores"]
      drawing.draw_interval(left, steps, scores, looks[name], name)
    left.axhline(summary["guess"], color="black", linestyle=":")
    left.set(xlabel="step", ylabel="share of right answers", ylim=(0, 1.03))
    places, num_layers = np.arange(mass.shape[2]), mass.shape[1]
    shifts, marks = drawing.shifts(num_layers), drawing.looks(num_layers)
    for layer, (shift, mark) in enumerate(zip(shifts, marks, strict=True)):
      band = intervals.interval(mass[:, layer], least=0, most=1)
      values = np.array([band[k] for k in ("mean", "low", "high")])
      mark = mark._replace(linestyle="")
      drawing.draw_points(right, places + shift, values, mark, f"layer {layer}")
    right.set_xticks(places, ("word", "named", "other", "rest"))
    right.set_ylabel("weight of [REG]")
    entries = figures.legend_entries(left)
    figures.put_legend_above(figure, entries)
    right.legend(frameon=False)
  return figure


STUDY = study_lib.Study(
    title="Grid: rows, columns, and boxes that a word names",
    config=GridConfig(),
    smoke=dict(
        batch_size=2,
        size=4,
        width=8,
        num_heads=2,
        num_test=4,
        num_seeds=2,
        num_steps=2,
        num_records=2,
    ),
    measure=study_lib.in_parts("grid", measure),
    draw=draw,
    caption=(
        "Left: share of grids of which [REG] says whether two marks are on one"
        " row; dotted a guess. Right: weight of [REG] on the word, the box that"
        " it names, the other box and all else, mean over heads and seeds, with"
        " attention in both layers."
        f" {study_lib.BANDS}"
    ),
    report_title="Attention systems",
)
