"""Does attention find a needle in a text longer than it was trained on?

Softmax dilutes: the weight of a key that leads n others by c falls as n grows.
Selective self-attention (https://arxiv.org/abs/2411.12892) sharpens it by a
temperature that grows with ln n and with what a token says. One layer without
positions reads tokens of a key (a, b) and a value; the last token asks for the
value of one key. Of the other tokens half share a or b with it, so that each
part of a key alone leaves a crowd behind, and the crowd's values are two of
all, so that what is diluted is also outvoted. Models

  softmax   plain
  log n     tau = 1 + sigmoid(alpha) ln n, alpha learned, nothing of tokens
  ssa       the same, and tanh f(x)

train at 16 to 64 tokens until their loss is the same, .5 nats, where the
needle's lead is no more than it has to be, and are asked at lengths up to 16
times that.

The figure shows weight on the needle, and right answers, against length.

Paper's settings: those of the system `ssa`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from joma.studies import training
  from joma.transformer import attention
  from joma.transformer import config as configs
  from joma.transformer.layers import cross_entropy
  from kernels_pallas import masks
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

MODELS: dict[str, tuple[str, ...]] = {
    "softmax": (),
    "log n": ("ssa:width=0",),
    "ssa": ("ssa",),
}
# Texts of one call: weights of the longest are arrays of T^2.
_AT_ONCE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthConfig:
  """Does attention find a needle in a text longer than it was trained on?

  Attributes:
    models: Which are trained, softmax among them.
    factors: Lengths that are tested, in units of the longest of training.
    num_seeds: Runs of each model.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Most steps of a run, a multiple of num_records.
    num_records: Records of each run.
    target_loss: Loss in nats at which runs end.
    batch_size: Texts of a step.
    length: Tokens of the longest text of training; the shortest has a quarter.
    num_parts: Values of each of a key's two parts.
    num_values: Values to be answered.
    width: Width of tokens.
    rate: Highest learning rate.
    num_test: Texts that are tested at each length, a multiple of 4.
  """

  models: tuple[str, ...] = tuple(MODELS)
  factors: tuple[int, ...] = (1, 4, 16)
  num_seeds: int = 4
  first_seed: int = 0
  num_steps: int = 1600
  num_records: int = 160
  target_loss: float = 0.5
  batch_size: int = 32
  length: int = 64
  num_parts: int = 8
  num_values: int = 16
  width: int = 32
  rate: float = 3e-3
  num_test: int = 64

  def __post_init__(self):
    settings_lib.check_runs(self)
    settings_lib.require_choices("models", self.models, tuple(MODELS))
    if "softmax" not in self.models:
      raise errors.UserError("models must have softmax among them.")
    for factor in self.factors:
      require.between("factors", factor, 1, 64)
    require.at_least("batch_size", self.batch_size, 1)
    for name in ("width", "num_parts", "num_values"):
      require.between(name, getattr(self, name), 2, 1024)
    require.between("length", self.length, 8, 512)
    for name in ("rate", "target_loss"):
      require.positive(name, getattr(self, name))
    settings_lib.require_multiple("num_test", self.num_test, _AT_ONCE)


class Haystacks(NamedTuple):
  """Texts: what each token says.

  Attributes:
    parts: The key of each token [2, B, T].
    value: Of each token [B, T].
    last: Where the question stands [B].
    needle: Where the answer stands [B].
  """

  parts: jax.Array
  value: jax.Array
  last: jax.Array
  needle: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finder:
  """One layer that looks a value up: a `training.Problem`.

  Attributes:
    attention: Systems of the layer.
    config: Sizes.
  """

  attention: tuple[str, ...]
  config: LengthConfig

  @property
  def attend(self) -> attention.Attention:
    """The layer: one head, no positions."""
    shape = configs.TransformerConfig(
        num_layers=1,
        embed_dim=self.config.width,
        num_heads=1,
        num_kv_heads=1,
        head_dim=self.config.width,
        positions="none",
        attention=self.attention,
    )
    return attention.Attention(shape, 0, implementation="reference")

  def init(self, key: jax.Array) -> dict[str, Any]:
    """Draws the parameters."""
    config = self.config
    keys = jax.random.split(key, 4)
    rows = 2 * config.num_parts + config.num_values + 1
    x = jnp.zeros((1, 2, config.width))
    return {
        "tables": jax.random.normal(keys[0], (rows, config.width)),
        "out": (
            config.width**-0.5
            * jax.random.normal(keys[1], (config.width, config.num_values))
        ),
        "attn": self.attend.init(keys[2], x, *_where(x))["params"],
    }

  def draw(
      self, key: jax.Array, num_texts: int, length: int, shortest: int
  ) -> Haystacks:
    """Draws texts of a length down to the shortest, filled up behind."""
    keys = iter(jax.random.split(key, 9))
    num_parts = self.config.num_parts
    below = lambda most, *shape: jax.random.randint(next(keys), shape, 0, most)
    last = length - 1 - below(length - shortest + 1, num_texts)
    needle = below(10**6, num_texts) % last
    asked = below(num_parts, 2, num_texts)
    # Of other tokens: another part than the needle's, one of them or both.
    shape = (num_texts, length)
    other = 1 + below(num_parts - 1, 2, *shape)
    shared = below(4, *shape)
    is_shared = jnp.stack([shared == 0, shared == 1])
    place = jnp.arange(length)[None]
    is_needle = place == needle[:, None]
    is_key = is_needle | (place == last[:, None])
    step = jnp.where(is_shared | is_key[None], 0, other)
    crowd = below(self.config.num_values, 2, num_texts, 1)
    value = jnp.where(below(2, *shape) == 0, crowd[0], crowd[1])
    answer = below(self.config.num_values, num_texts)
    value = jnp.where(is_needle, answer[:, None], value)
    own = (asked[..., None] + step) % num_parts
    return Haystacks(own, value, last, needle)

  def apply(
      self, params: Mapping[str, Any], found: Haystacks
  ) -> tuple[jax.Array, jax.Array]:
    """Returns logits of values [B, V], and weights on the needle [B]."""
    num_parts, tables = self.config.num_parts, params["tables"]
    is_asking = jnp.arange(found.value.shape[1])[None] == found.last[:, None]
    value = jnp.where(is_asking, self.config.num_values, found.value)
    x = tables[found.parts[0]] + tables[num_parts + found.parts[1]]
    x = x + tables[2 * num_parts + value]
    (update, *_), seen = self.attend.apply(
        {"params": params["attn"]}, x, *_where(x), mutable="intermediates"
    )
    read = jnp.take_along_axis(update, found.last[:, None, None], axis=1)[:, 0]
    (weights,) = seen["intermediates"]["attn_weights"]
    rows = jnp.arange(len(x))
    return read @ params["out"], weights[rows, 0, found.last, found.needle]

  def loss(
      self, params: Mapping[str, Any], key: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of new texts, and the share of right answers."""
    config = self.config
    found = self.draw(key, config.batch_size, config.length, config.length // 4)
    logits, _ = self.apply(params, found)
    answer = _answer(found)
    losses = cross_entropy.token_losses(logits[:, None], answer[:, None])
    return losses.mean(), (logits.argmax(axis=-1) == answer).mean()

  def look(
      self, params: Mapping[str, Any], key: jax.Array, length: int
  ) -> tuple[jax.Array, jax.Array]:
    """Mean weight on the needle and share of right answers at a length."""
    found = self.draw(key, _AT_ONCE, length, length)
    logits, weights = self.apply(params, found)
    return weights.mean(), (logits.argmax(axis=-1) == _answer(found)).mean()


def _where(x: jax.Array) -> tuple[jax.Array, masks.Mask]:
  """Positions and the causal mask."""
  places = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
  return places, masks.causal(x.shape[1])


def _answer(found: Haystacks) -> jax.Array:
  return found.value[jnp.arange(len(found.value)), found.needle]


def measure(
    config: LengthConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains the three models to one loss and tests them on longer texts.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "lengths"; "rows", of each model: the "loss" of its last record, "mass" on
    the needle and "accuracy" at each length, intervals over seeds, and each
    seed's "masses" and "accuracies"; "claims" and "finding".
  """
  part = part or parts.at_once
  lengths = [factor * config.length for factor in config.factors]
  rows = {
      name: part(name, lambda n=name: _run(config, n, lengths))
      for name in config.models
  }
  told = _claims(config, rows)
  return {
      "num_seeds": config.num_seeds,
      "lengths": lengths,
      "rows": rows,
      "claims": told,
      "finding": claims.finding(told),
  }


def _run(config: LengthConfig, name: str, lengths: list[int]) -> dict[str, Any]:
  finder = Finder(attention=MODELS[name], config=config)
  seeds = settings_lib.seeds(config)
  trained = training.train(
      finder,
      seeds,
      schedule=training.Schedule(
          num_steps=config.num_steps,
          num_records=config.num_records,
          target_loss=config.target_loss,
      ),
      rate=config.rate,
  )
  look = jax.jit(finder.look, static_argnums=2)
  found = np.zeros((2, len(seeds), len(lengths)))
  num_calls = config.num_test // _AT_ONCE
  for run, seed in enumerate(seeds):
    params = trained.params_of(run)
    for place, length in enumerate(lengths):
      for call in range(num_calls):
        # No key of training; the same for all models.
        key = jax.random.fold_in(jax.random.key(seed + 2**30), call)
        found[:, run, place] += np.array(look(params, key, length)) / num_calls
  mass, accuracy = found
  return {
      "loss": trained.losses[:, -1],
      "took": trained.num_steps,
      "masses": mass,
      "accuracies": accuracy,
      "mass": intervals.interval(mass, least=0, most=1),
      "accuracy": intervals.interval(accuracy, least=0, most=1),
      "steps": trained.steps,
      "curves": trained.curves(),
  }


def _claims(
    config: LengthConfig, rows: dict[str, dict[str, Any]]
) -> list[claims.Row]:
  losses = {name: np.array(row["loss"]) for name, row in rows.items()}
  told = [
      claims.row(
          "all models are trained to the same loss",
          f"every seed below {config.target_loss:g}",
          ", ".join(
              f"{name} {loss.min():.3f} to {loss.max():.3f}"
              for name, loss in losses.items()
          ),
          all((loss < config.target_loss).all() for loss in losses.values()),
      )
  ]
  for name in (name for name in config.models if name != "softmax"):
    for place, factor in enumerate(config.factors):
      if factor == 1:
        continue
      for what, key in (
          ("weight on the needle", "masses"),
          ("accuracy", "accuracies"),
      ):
        of = lambda name, key=key, place=place: (
            np.array(rows[name][key])[:, place]
        )
        gain = intervals.interval(of(name) - of("softmax"))
        told.append(
            claims.row(
                f"at {factor} times the length {name} has more {what} than"
                " softmax",
                "a gain whose interval over seeds is above 0",
                f"{intervals.text(gain)}, to {of(name).mean():.3f}",
                gain["low"] > 0,
            )
        )
  return told


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws weight on the needle and accuracy against length."""
  lengths = np.array(summary["lengths"], float)
  looks = drawing.looks_of(list(MODELS))
  titles = {
      "mass": "weight on the needle",
      "accuracy": "share of right answers",
  }
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.6)
    panels = figure.subplots(1, 2, sharey=True).tolist()
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
      for name, row in summary["rows"].items():
        values = np.array([row[key][part] for part in ("mean", "low", "high")])
        drawing.draw_points(axes, lengths, values, looks[name], name)
      axes.set(title=title, xlabel="tokens", xscale="log", ylim=(0, 1.03))
      axes.set_xticks(lengths, [f"{n:g}" for n in lengths], minor=False)
      axes.set_xticks([], minor=True)
    figures.put_legend_above(figure, figures.legend_entries(panels[0]))
  return figure


STUDY = study_lib.Study(
    title="Selective self-attention: a needle in longer texts",
    config=LengthConfig(),
    smoke=dict(
        batch_size=2,
        length=8,
        factors=(1, 2),
        num_parts=3,
        num_values=4,
        width=8,
        num_test=4,
        num_seeds=2,
        num_steps=2,
        num_records=2,
    ),
    measure=study_lib.in_parts("length", measure),
    draw=draw,
    caption=(
        "One layer trained to one loss (by default on texts of 16 to 64"
        " tokens), asked for a needle among tokens that share half of its key:"
        " weight on the needle and share of right answers against length. Means"
        " over seeds and 95 % intervals (Student's t)."
    ),
    report_title="Attention systems",
)
