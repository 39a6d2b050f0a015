"""Which pooling finds what a model knew once and forgot?

A stream of L layers walks at random. A class is added to it as a direction, to
every token, after the first layer, and taken off again after the second; or
after the last layer, and stays. A linear layer on the pooled vector is to say
the class: one vector of the last layer's states (`eos`, `mean`, learned queries
over its tokens) holds the second alone, learned queries over the last token's
state after each layer (https://arxiv.org/abs/2409.02727) hold both. The stream
is made, not a model's: that is what makes the answer known.
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
  import jax.numpy as jnp
  import jaxtyping
  from matplotlib import figure as mpl_figure
  import numpy as np
  import optax

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from joma.studies import training
  from joma.systems.readouts import pooling
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

DESIGNS = ("mean", "eos", "latents", "layers")
# After which layer the class shows; both have a guess of 1 / num_classes.
PLACES = ("the first layer", "the last layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolingConfig:
  """Which pooling finds what a model knew once and forgot?

  Attributes:
    num_seeds: Runs of each design and place.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Steps of a run, a multiple of num_records.
    num_records: Records of each run.
    batch_size: Texts of a step, drawn anew.
    num_layers: Layers of the stream.
    num_tokens: Tokens of a text.
    width: Width of the stream.
    num_classes: Classes, each a direction of its own.
    signal: Length of a class's direction; a layer's step has length 1.
    num_latents: Learned queries.
    rate: Highest learning rate.
  """

  num_seeds: int = 3
  first_seed: int = 0
  num_steps: int = 200
  num_records: int = 20
  batch_size: int = 64
  num_layers: int = 4
  num_tokens: int = 6
  width: int = 16
  num_classes: int = 2
  signal: float = 4.0
  num_latents: int = 8
  rate: float = 0.01

  def __post_init__(self):
    settings_lib.check_trained(self, "batch_size", "num_tokens", "num_latents")
    require.at_least("num_layers", self.num_layers, 3)
    require.at_least("width", self.width, 4)
    require.between("num_classes", self.num_classes, 2, self.width)
    require.positive("signal", self.signal)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOut:
  """A design on streams with a class in one place: `training.Problem`.

  Attributes:
    config: Sizes.
    design: Of `DESIGNS`.
    place: Of `PLACES`.
  """

  config: PoolingConfig
  design: str
  place: str

  def draw(
      self, key: jax.Array
  ) -> tuple[
      jaxtyping.Float[jax.Array, "B M T D"], jaxtyping.Int[jax.Array, "B"]
  ]:
    """Draws streams [B, L + 1, T, D] and their classes."""
    c, keys = self.config, jax.random.split(key, 2)
    shape = (c.batch_size, c.num_layers + 1, c.num_tokens, c.width)
    steps = jax.random.normal(keys[0], shape) * c.width**-0.5
    label = jax.random.randint(keys[1], (c.batch_size,), 0, c.num_classes)
    shown = c.signal * jnp.eye(c.width)[label][:, None, None]
    places = jnp.arange(c.num_layers + 1)[None, :, None, None]
    where = 1 if self.place == PLACES[0] else c.num_layers
    return steps.cumsum(axis=1) + shown * (places == where), label

  def _module(self) -> pooling.LatentPooling:
    return pooling.LatentPooling(
        num_latents=self.config.num_latents,
        num_heads=2,
        hidden_dim=2 * self.config.width,
        has_layers=self.design == "layers",
    )

  def _states(
      self, resid: jaxtyping.Float[jax.Array, "B M T D"]
  ) -> jaxtyping.Float[jax.Array, "B S D"]:
    if self.design == "latents":
      return resid[:, -1]
    return resid[:, 1:, -1]

  def init(self, key: jax.Array) -> jaxtyping.PyTree:
    """Draws the read-out's parameters, and starts the classifier at 0."""
    c = self.config
    params: dict[str, Any] = {"head": jnp.zeros((c.width, c.num_classes))}
    if self.design not in pooling.FIXED:
      states = self._states(self.draw(key)[0])
      is_state = jnp.ones(states.shape[:2], bool)
      params["pool"] = self._module().init(key, states, is_state)["params"]
    return params

  def loss(
      self, params: jaxtyping.PyTree, key: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy, and the share of classes that are right."""
    resid, label = self.draw(key)
    if self.design in pooling.FIXED:
      lengths = jnp.full(len(resid), self.config.num_tokens)
      vectors = pooling.pool(self.design, resid, lengths)
    else:
      states = self._states(resid)
      is_state = jnp.ones(states.shape[:2], bool)
      vectors = self._module().apply(
          {"params": params["pool"]}, states, is_state
      )
    logits = vectors @ params["head"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return loss.mean(), (logits.argmax(axis=-1) == label).mean()


def measure(
    config: PoolingConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains every design on both places.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", of each place and design: "accuracy" of the last record and
    "scores" along training, intervals over seeds; "steps", "guess", "claims"
    and "finding".
  """
  part = part or parts.at_once
  rows = {
      f"{design}, {place}": part(
          f"{design}, {place}", lambda d=design, p=place: _run(config, d, p)
      )
      for place in PLACES
      for design in DESIGNS
  }
  told = _claims(config, rows)
  return {
      "num_seeds": config.num_seeds,
      "guess": 1 / config.num_classes,
      "steps": next(iter(rows.values()))["steps"],
      "rows": rows,
      "claims": told,
      "finding": claims.finding(told),
  }


def _run(config: PoolingConfig, design: str, place: str) -> dict[str, Any]:
  trained = training.train(
      ReadOut(config=config, design=design, place=place),
      settings_lib.seeds(config),
      schedule=training.Schedule(
          num_steps=config.num_steps, num_records=config.num_records
      ),
      rate=config.rate,
  )
  return {
      "accuracy": intervals.interval(trained.scores[:, -1], least=0, most=1),
      "steps": trained.steps,
      "scores": intervals.interval(trained.scores, least=0, most=1),
      "curves": trained.curves(),
  }


def _claims(
    config: PoolingConfig, rows: dict[str, dict[str, Any]]
) -> list[claims.Row]:
  first, last = PLACES
  guess = 1 / config.num_classes
  found = lambda design, place: rows[f"{design}, {place}"]["accuracy"]
  told = [
      claims.row(
          f"queries over layers find a class that shows after {first} alone",
          "above .95",
          intervals.text(found("layers", first)),
          found("layers", first)["mean"] > 0.95,
      )
  ]
  told += [
      claims.row(
          f"{design} of the last layer does not",
          f"below {guess + 0.1:.2f}",
          intervals.text(found(design, first)),
          found(design, first)["mean"] < guess + 0.1,
      )
      for design in ("eos", "mean", "latents")
  ]
  every = [found(design, last) for design in DESIGNS]
  told.append(
      claims.row(
          f"every design finds it after {last}",
          "above .95, all four",
          ", ".join(map(intervals.text, every)),
          min(each["mean"] for each in every) > 0.95,
      )
  )
  return told


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the share of right classes along training, a panel a place."""
  looks, rows = drawing.looks_of(DESIGNS), summary["rows"]
  steps = np.asarray(summary["steps"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.6)
    panels = figure.subplots(1, len(PLACES), sharey=True).tolist()
    for axes, place in zip(panels, PLACES, strict=True):
      for name in DESIGNS:
        scores = rows[f"{name}, {place}"]["scores"]
        drawing.draw_interval(axes, steps, scores, looks[name], name)
      axes.axhline(summary["guess"], color="black", linestyle=":")
      axes.set(title=f"shown after {place}", xlabel="step", ylim=(0, 1.03))
    panels[0].set_ylabel("share of right classes")
    figures.put_legend_above(figure, figures.legend_entries(panels[0]))
  return figure


STUDY = study_lib.Study(
    title="Pooling: what one vector of a text can hold",
    config=PoolingConfig(),
    smoke=dict(
        batch_size=4,
        num_tokens=2,
        width=4,
        num_latents=2,
        num_seeds=2,
        num_steps=2,
        num_records=2,
    ),
    measure=study_lib.in_parts("pooling", measure),
    draw=draw,
    caption=(
        "Share of texts whose class a linear layer reads off the pooled vector,"
        " on texts not seen before. Dotted: a guess."
        f" {study_lib.BANDS}"
    ),
    report_title="Attention systems",
)
