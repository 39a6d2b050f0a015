"""Which heads fetch a fact's subject, and do answers follow them?

A text is a subject of two names, a few words without meaning, and a relation,
to be followed by what the relation says of the subject: the last token knows
the relation alone, so that heads must bring the subject
(https://arxiv.org/abs/2403.19521). `systems.probes.recall` takes the logits
apart; `systems.probes.patching` lets heads say what they said of another
subject.

Heads are found on half of the subjects, by what each of them alone moves of the
logits from one subject's answer to the other's: the first of them that together
flip `enough` of the answers, at most half of all heads. How many answers they
flip is told of the other half, beside as many heads drawn from the rest.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  import jaxtyping
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import once
  from joma.studies import parts
  from joma.studies import texts
  from joma.studies import training
  from joma.studies.systems.subjects import associations
  from joma.systems.probes import patching
  from joma.systems.probes import recall
  from joma.transformer import config as configs
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

_SUMS, _FLIPS, _RANDOM = 1e-4, 0.9, 0.1
# Ours: the paper shows how close, of large models, and names no bound.
_R2 = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallConfig:
  """Which heads fetch a fact's subject, and do answers follow them?

  Attributes:
    num_seeds: Number of models, each from a seed of its own.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Steps of a run, a multiple of num_records.
    num_records: Records of each run.
    batch_size: Texts of a step.
    num_names: First names, and as many last names; a pair of them is a
      subject, of which half find the heads.
    num_relations: Number of relations.
    num_values: Answers of each relation.
    num_filler: Words without meaning between subject and relation.
    num_layers: Layers of the model.
    num_heads: Heads of a layer.
    width: Width of the residual stream.
    rate: Highest learning rate.
    decay: Decoupled decay of the parameters.
    enough: Share of answers that the found heads flip where they are found.
    num_random: Draws of as many other heads.
  """

  num_seeds: int = 3
  first_seed: int = 0
  num_steps: int = 1500
  num_records: int = 15
  batch_size: int = 64
  num_names: int = 8
  num_relations: int = 4
  num_values: int = 16
  num_filler: int = 2
  num_layers: int = 3
  num_heads: int = 4
  width: int = 64
  rate: float = 3e-3
  decay: float = 1.0
  enough: float = 0.95
  num_random: int = 8

  def __post_init__(self):
    settings_lib.check_trained(
        self, "batch_size", "num_relations", "num_layers", "num_random"
    )
    require.at_least("num_filler", self.num_filler, 0)
    require.positive("decay", self.decay)
    require.at_least("num_heads", self.num_heads, 2)
    require.at_least("num_values", self.num_values, 2)
    settings_lib.require_multiple("num_names", self.num_names, 2)
    settings_lib.require_multiple("width", self.width, 2 * self.num_heads)
    require.positive("enough", self.enough)


def learner(config: RecallConfig) -> texts.Learner:
  """The model and its facts."""
  sizes = ("num_names", "num_relations", "num_values", "num_filler")
  task = associations.Associations(
      **{name: getattr(config, name) for name in sizes}
  )
  model = configs.TransformerConfig(
      vocab_size=task.vocab_size,
      num_layers=config.num_layers,
      embed_dim=config.width,
      num_heads=config.num_heads,
      num_kv_heads=config.num_heads,
      head_dim=config.width // config.num_heads,
      hidden_dim=4 * config.width,
      max_len=task.length,
      tie_embeddings=False,
  )
  return texts.Learner(model=model, task=task, batch_size=config.batch_size)


def measure(
    config: RecallConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains the models, finds their heads, and patches them.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    Of every seed: "accuracy", "sums" (largest difference of the parts' sum and
    the logits), "effects" of each head, "num_found" heads and the answers that
    they "flip" and that others do, "random"; "r2" of each layer's MLP, mean
    over relations, a row a seed; "claims" and "finding".
  """
  part = part or parts.at_once
  found = part("models", lambda: _run(config))
  told = _claims(config, found)
  return {**found, "claims": told, "finding": claims.finding(told)}


def _run(config: RecallConfig) -> dict[str, Any]:
  one = learner(config)
  trained = training.train(
      one,
      settings_lib.seeds(config),
      schedule=training.Schedule(
          num_steps=config.num_steps, num_records=config.num_records
      ),
      rate=config.rate,
      decay=config.decay,
  )
  rows = []
  for run, seed in enumerate(settings_lib.seeds(config)):
    params = jax.device_put(trained.params_of(run))
    rows.append(_look(config, one, params, seed))
  return {
      **{name: [row[name] for row in rows] for name in rows[0]},
      "num_heads": config.num_layers * config.num_heads,
      "steps": trained.steps,
      "curves": trained.curves(),
  }


def _look(
    config: RecallConfig,
    one: texts.Learner,
    params: jaxtyping.PyTree,
    seed: int,
) -> dict[str, Any]:
  """One model: parts, effects, flips and regressions."""
  task: Any = one.task
  asked = task.pairs(jax.random.key(seed))
  read = once.jit(
      lambda tokens: one.transformer.apply(
          {"params": params}, tokens, mutable="intermediates"
      )
  )
  at = jnp.full(len(asked.tokens), task.length - 1)
  logits, seen = read(asked.tokens)
  _, other = read(asked.other_tokens)
  written = recall.writes(params, one.model, seen, at)
  total = recall.to_logits(params, one.model, written.total(), written.total())
  total += recall.constant(params, one.model)[None]
  is_right = logits[:, -1].argmax(axis=-1) == asked.answers
  flips = _flips(config, one, params, asked, other)
  return {
      "accuracy": float(is_right.mean()),
      "sums": float(jnp.abs(total - logits[:, -1]).max()),
      "r2": _regressions(config, written, np.asarray(asked.relations)),
      **_found(config, flips, np.asarray(asked.is_first_half), seed),
  }


def _flips(
    config: RecallConfig,
    one: texts.Learner,
    params: jaxtyping.PyTree,
    asked: associations.Pairs,
    other: Any,
) -> Any:
  """What patching a set of heads does: moved logits, and flipped answers."""
  at = jnp.full(len(asked.tokens), asked.tokens.shape[1] - 1)
  head_out = patching.head_outs(other, config.num_layers, at)

  def run(is_patched: jax.Array) -> tuple[jax.Array, jax.Array]:
    patch = patching.Patch(head_out=head_out, at=at, is_patched=is_patched)
    logits: Any = one.transformer.apply(
        {"params": params}, asked.tokens, router=patch
    )
    rows = jnp.arange(len(at))
    of = lambda token: logits[rows, -1, token]
    moved = of(asked.other_answers) - of(asked.answers)
    return moved, logits[:, -1].argmax(axis=-1) == asked.other_answers

  return once.jit(run)


def _found(
    config: RecallConfig,
    flips: Any,
    is_first: jaxtyping.Bool[np.ndarray, "B"],
    seed: int,
) -> dict[str, Any]:
  """The heads found on the first half, and what they flip of the second."""
  shape = (config.num_layers, config.num_heads)
  count = math.prod(shape)
  as_set = lambda heads: np.isin(np.arange(count), heads).reshape(shape)
  run = lambda heads: jax.tree.map(np.asarray, flips(as_set(heads)))
  before = run([])[0]
  effects = np.array(
      [(run([head])[0] - before)[is_first].mean() for head in range(count)]
  )
  order = np.argsort(-effects)
  flip = lambda heads: run(heads)[1][is_first].mean()
  sizes = range(1, count // 2)
  enough = (size for size in sizes if flip(order[:size]) >= config.enough)
  chosen = order[: next(enough, count // 2)]
  draw = np.random.default_rng(seed)
  rest = order[len(chosen) :]
  others = [
      draw.choice(rest, len(chosen), replace=False)
      for _ in range(config.num_random)
  ]
  share = lambda heads: float(run(heads)[1][~is_first].mean())
  return {
      "effects": effects.reshape(shape),
      "num_found": len(chosen),
      "flip": share(chosen),
      "random": float(np.mean([share(heads) for heads in others])),
  }


def _regressions(
    config: RecallConfig,
    written: recall.Writes,
    relations: jaxtyping.Int[np.ndarray, "B"],
) -> list[float]:
  """R^2 of each layer's MLP, of a relation at a time, mean over relations."""
  mlp, heads = np.asarray(written.mlp), np.asarray(written.heads)
  found = []
  for layer in range(config.num_layers):
    before = heads[:, : layer + 1].reshape(len(heads), -1, config.width)
    of = [relations == r for r in range(config.num_relations)]
    r2 = [recall.regress(mlp[rows, layer], before[rows]).r2 for rows in of]
    found.append(float(np.mean(r2)))
  return found


def _claims(config: RecallConfig, found: dict[str, Any]) -> list[claims.Row]:
  accuracy, flip = found["accuracy"], found["flip"]
  of = lambda name: intervals.interval(np.array(found[name]), least=0, most=1)
  heads = ", ".join(map(str, found["num_found"]))
  r2 = np.array(found["r2"])
  layers = ", ".join(intervals.text(intervals.interval(x)) for x in r2.T)
  return [
      claims.row(
          "the models know their facts",
          "above .99, every seed",
          f"{min(accuracy):.3f} at least",
          min(accuracy) > 0.99,
      ),
      claims.row(
          "embedding, heads and MLPs add up to the logits",
          f"within {_SUMS:g}",
          f"{max(found['sums']):.1e}",
          max(found["sums"]) <= _SUMS,
      ),
      claims.row(
          "answers follow the heads that were found, on subjects not used",
          f"{_FLIPS} or more of them",
          f"{intervals.text(of('flip'))}, by {heads} of"
          f" {found['num_heads']} heads",
          float(np.mean(flip)) >= _FLIPS,
      ),
      claims.row(
          "they do not follow as many of the other heads",
          f"{_RANDOM} or fewer",
          intervals.text(of("random")),
          float(np.mean(found["random"])) <= _RANDOM,
      ),
      claims.row(
          "the last MLP's output is a weighted sum of heads and a constant of"
          " the relation",
          f"R^2 above {_R2}",
          f"layer by layer {layers}",
          r2[:, -1].mean() > _R2,
      ),
  ]


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws each head's effect, and what patching flips."""
  effects = np.asarray(summary["effects"])
  names = ("found", "others")
  looks = drawing.looks_of(names)
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.4)
    left, right = figure.subplots(1, 2)
    places = np.arange(summary["num_heads"])
    for seed, values in enumerate(effects.reshape(len(effects), -1)):
      look = drawing.looks(len(effects))[seed]
      left.plot(places, values, **look._asdict(), label=f"model {seed}")
    left.set(xlabel="head, layer by layer", ylabel="logits moved")
    left.locator_params(axis="x", integer=True)
    shares = (summary["flip"], summary["random"])
    for i, (name, values) in enumerate(zip(names, shares, strict=True)):
      look = looks[name]
      x = np.full(len(values), float(i))
      right.plot(x, values, marker=look.marker, linestyle="", color=look.color)
    right.set(xlim=(-0.5, 1.5), ylim=(-0.03, 1.03))
    right.set_xticks((0, 1), names)
    right.set_ylabel("share of answers that flip")
    figures.put_legend_above(figure, figures.legend_entries(left))
  return figure


STUDY = study_lib.Study(
    title="Recall: which heads fetch a fact's subject",
    config=RecallConfig(),
    smoke=dict(
        batch_size=2,
        num_names=2,
        num_relations=2,
        num_values=4,
        num_filler=1,
        num_layers=2,
        num_heads=2,
        width=8,
        num_random=1,
        num_seeds=2,
        num_steps=2,
        num_records=2,
    ),
    measure=study_lib.in_parts("recall", measure),
    draw=draw,
    caption=(
        "Left: what each head alone moves of the logits, from the subject's"
        " answer to another subject's, when it says what it said of the other."
        " Right: answers that become the other subject's, of subjects that were"
        " not used to find the heads, a point a model."
    ),
    report_title="Attention systems",
)
