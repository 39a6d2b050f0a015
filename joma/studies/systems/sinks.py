"""What takes the attention sink away from the first token?

When Attention Sink Emerges (https://arxiv.org/abs/2410.10781): softmax must put
its mass somewhere, and a learned key without value takes it over at no cost;
weights without row sums need no sink. The task is Bigram-Backcopy
(https://arxiv.org/abs/2410.13835): tokens follow a fixed bigram, but what
follows a trigger is the token before it. Heads that copy have nothing to do
elsewhere, and read the first token. Models of two layers have

  softmax      plain
  k-bias       a learned key before the text, without value
  sink logits  a learned logit of nothing
  sigmoid      weights sigmoid(l + b), without row sums
  gated        a sigmoid gate of each output of a head

The sink metric is the share of texts and heads in which the first token's mean
weight is above .3, summed over layers. Without row sums it is taken of weights
divided by their row sums: a proxy. Plain models of other rates, decays and
windows stand beside.

Paper's settings: those of the system `pointwise`.
"""

from __future__ import annotations

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
  from joma.studies import once
  from joma.studies import parts
  from joma.studies import texts
  from joma.studies import training
  from joma.systems.probes import maps
  from joma.transformer import config as configs
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

_NUM_TEST = 128


class Model(NamedTuple):
  """A model of the study, and how it is trained.

  Attributes:
    attention: Systems of all layers.
    rate: Factor of the learning rate.
    decay: Weight decay.
    window: Keys that a query sees; 0 is all.
  """

  attention: tuple[str, ...] = ()
  rate: float = 1.0
  decay: float = 0.0
  window: int = 0


MODELS: dict[str, Model] = {
    "softmax": Model(),
    "k-bias": Model(("key_bias",)),
    "sink logits": Model(("sink_logits",)),
    "sigmoid": Model(("pointwise:start=-3",)),
    "gated": Model(("gated_attention",)),
    "rate / 4": Model(rate=0.25),
    "rate x 4": Model(rate=4.0),
    "decay 0.5": Model(decay=0.5),
    "decay 5": Model(decay=5.0),
    "window 8": Model(window=8),
}
_OF_SYSTEMS = ("softmax", "k-bias", "sink logits", "sigmoid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinksConfig:
  """What takes the attention sink away from the first token?

  Attributes:
    models: Which are trained, softmax among them.
    num_seeds: Runs of each model.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Steps of a run, a multiple of num_records.
    num_records: Records of each run.
    batch_size: Texts of a step.
    seq_len: Tokens of a text.
    vocab_size: Tokens that there are, the first token of texts among them.
    num_triggers: Tokens after which the one before them is said again.
    width: Width of the residual stream.
    rate: Highest learning rate.
  """

  models: tuple[str, ...] = tuple(MODELS)
  num_seeds: int = 4
  first_seed: int = 0
  num_steps: int = 1200
  num_records: int = 20
  batch_size: int = 16
  seq_len: int = 32
  vocab_size: int = 32
  num_triggers: int = 3
  width: int = 48
  rate: float = 3e-3

  def __post_init__(self):
    settings_lib.check_runs(self)
    settings_lib.require_choices("models", self.models, tuple(MODELS))
    if "softmax" not in self.models:
      raise errors.UserError("models must have softmax among them.")
    require.at_least("batch_size", self.batch_size, 1)
    require.between("seq_len", self.seq_len, 4, 4096)
    require.between("num_triggers", self.num_triggers, 1, self.vocab_size - 2)
    settings_lib.require_multiple("width", self.width, 4)
    require.positive("rate", self.rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backcopy:
  """Bigram-Backcopy: `texts.Task`; token 0 is first, triggers follow it.

  Attributes:
    seq_len: T.
    vocab_size: V.
    num_triggers: Tokens 1 to this are triggers.
  """

  seq_len: int
  vocab_size: int
  num_triggers: int

  def draw(self, key: jax.Array, num_texts: int) -> texts.Texts:
    """Draws texts; what follows a trigger is scored."""
    # The same bigram for all seeds; nothing leads back to token 0.
    scores = 2 * jax.random.normal(jax.random.key(0), (self.vocab_size,) * 2)
    scores = scores.at[:, 0].set(-jnp.inf)
    noise = jax.random.gumbel(key, (self.seq_len, num_texts, self.vocab_size))

    def step(
        pair: tuple[jax.Array, jax.Array], noise: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
      before, now = pair
      following = (scores[now] + noise).argmax(axis=-1)
      is_copy = self._is_trigger(now) & (before > 0)
      following = jnp.where(is_copy, before, following)
      return (now, following), following

    start = jnp.zeros((num_texts,), jnp.int32)
    _, rest = jax.lax.scan(step, (start, start), noise)
    tokens = jnp.concatenate([start[:, None], rest.T], axis=1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    before = jnp.concatenate([start[:, None], inputs[:, :-1]], axis=1)
    is_copy = self._is_trigger(inputs) & (before > 0)
    return texts.Texts(inputs, targets, jnp.ones_like(is_copy), is_copy)

  def _is_trigger(self, token: jax.Array) -> jax.Array:
    return (token >= 1) & (token <= self.num_triggers)


def learner(config: SinksConfig, name: str) -> texts.Learner:
  """A model of `MODELS` and its task."""
  chosen, layers = MODELS[name], 2
  model = configs.TransformerConfig(
      vocab_size=config.vocab_size,
      num_layers=layers,
      embed_dim=config.width,
      num_heads=2,
      num_kv_heads=2,
      head_dim=config.width // 2,
      hidden_dim=2 * config.width,
      max_len=config.seq_len,
      positions="learned",
      windows=(chosen.window,) * layers if chosen.window else (),
      attention=chosen.attention,
  )
  task = Backcopy(
      seq_len=config.seq_len,
      vocab_size=config.vocab_size,
      num_triggers=config.num_triggers,
  )
  return texts.Learner(model=model, task=task, batch_size=config.batch_size)


def measure(
    config: SinksConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains the models and measures their sinks.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", of each model: "loss", "accuracy" of copies, "sink" rate of the
    first token summed over layers and "sink_of_means", intervals over seeds,
    and each seed's "losses" and "rates"; "claims" and "finding".
  """
  part = part or parts.at_once
  rows = {
      name: part(name, lambda n=name: _run(config, n)) for name in config.models
  }
  told = _claims(rows)
  return {
      "num_seeds": config.num_seeds,
      "rows": rows,
      "claims": told,
      "finding": claims.finding(told),
  }


def _run(config: SinksConfig, name: str) -> dict[str, Any]:
  one, chosen = learner(config, name), MODELS[name]
  seeds = settings_lib.seeds(config)
  trained = training.train(
      one,
      seeds,
      schedule=training.Schedule(
          num_steps=config.num_steps, num_records=config.num_records
      ),
      rate=chosen.rate * config.rate,
      decay=chosen.decay,
  )
  look = once.jit(one.look, static_argnums=2)
  found = []
  for run, seed in enumerate(seeds):
    key = jax.random.fold_in(jax.random.key(seed), 7)  # No key of training.
    loss, score, _, seen = look(trained.params_of(run), key, _NUM_TEST)
    rates = np.zeros(2)
    for layer in range(one.model.num_layers):
      (weights,) = seen[f"layers_{layer}"]["attn"]["attn_weights"]
      # What learned keys and logits take is not the text's: no row sums there.
      found_sinks = maps.of_maps(
          ("sinks", "sink_of_means"), weights, normalize=name == "sigmoid"
      )
      rates += [float(value.mean()) for value in found_sinks.values()]
    found.append([float(loss), float(score), *rates])
  loss, score, sink, of_means = np.array(found).T
  summed = dict(least=0, most=one.model.num_layers)
  return {
      "losses": loss,
      "rates": sink,
      "loss": intervals.interval(loss),
      "accuracy": intervals.interval(score, least=0, most=1),
      "sink": intervals.interval(sink, **summed),
      "sink_of_means": intervals.interval(of_means, **summed),
      "steps": trained.steps,
      "curves": trained.curves(),
  }


def _claims(rows: dict[str, dict[str, Any]]) -> list[claims.Row]:
  plain = rows["softmax"]
  told = []
  learned = [name for name in _OF_SYSTEMS[:3] if name in rows]
  losses = [rows[name]["loss"]["mean"] for name in learned]
  told.append(
      claims.row(
          f"{', '.join(learned)} have the same loss",
          "means within .02",
          ", ".join(f"{loss:.3f}" for loss in losses),
          max(losses) - min(losses) <= 0.02,
      )
  )
  scores = [rows[name]["accuracy"]["mean"] for name in learned]
  told.append(
      claims.row(
          "they copy what they should",
          "above .99 each",
          ", ".join(f"{score:.4f}" for score in scores),
          min(scores) > 0.99,
      )
  )
  rate = lambda name: intervals.text(rows[name]["sink"])
  if "k-bias" in rows:
    told.append(
        claims.row(
            "k-bias takes the sink over from the first token",
            "at most half of softmax's rate, which is above 0",
            f"{rate('k-bias')}, softmax {rate('softmax')}",
            0 < plain["sink"]["mean"]
            and rows["k-bias"]["sink"]["mean"] <= plain["sink"]["mean"] / 2,
        )
    )
  if "gated" in rows:
    told.append(
        claims.row(
            "a gate of the heads' outputs takes the sink from the first token"
            " (4.8 % against 46.7 %, https://arxiv.org/abs/2505.06708)",
            "at most half of softmax's rate, which is above 0",
            f"{rate('gated')}, softmax {rate('softmax')}",
            0 < plain["sink"]["mean"]
            and rows["gated"]["sink"]["mean"] <= plain["sink"]["mean"] / 2,
        )
    )
  # Name, the paper's figures, and whether the rate is to be larger.
  sweeps = (
      ("rate / 4", "2.9 % at 1e-4 against 32 % at 8e-4", False),
      ("rate x 4", "32 % at 8e-4 against 2.9 % at 1e-4", True),
      ("decay 0.5", "41.1 % at .5 against 15.2 % at 0", True),
      ("decay 5", ".01 % at 5 against 15.2 % at 0", False),
      ("window 8", "none with short windows", False),
  )
  for name, known, is_more in sweeps:
    if name in rows:
      gain = np.array(rows[name]["rates"]) - np.array(plain["rates"])
      gap = intervals.interval(gain)
      told.append(
          claims.row(
              f"{name}: {'more' if is_more else 'fewer'} sinks than the plain"
              " model",
              f"a difference {'above' if is_more else 'below'} 0 (paper:"
              f" {known})",
              intervals.text(gap),
              gap["low"] > 0 if is_more else gap["high"] < 0,
          )
      )
  return told


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws loss and sink rate of each model."""
  rows = summary["rows"]
  names, places = list(rows), np.arange(len(rows))
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.8)
    panels = figure.subplots(1, 2).tolist()
    for axes, (key, title) in zip(
        panels,
        (("sink", "sink rate, summed over layers"), ("loss", "loss (nats)")),
        strict=True,
    ):
      values = drawing.points([rows[name][key] for name in names])
      x, mean, spread = drawing.as_errors(places, values)
      axes.errorbar(x, mean, spread, color="#0072B2", marker="o", linestyle="")
      labels = [f"{n} (proxy)" if n == "sigmoid" else n for n in names]
      axes.set_xticks(places, labels, rotation=60, ha="right")
      axes.set(title=title, xlim=(-0.5, len(names) - 0.5))
    panels[0].set_ylim(0, None)
  return figure


STUDY = study_lib.Study(
    title="Attention sinks: what takes them from the first token",
    config=SinksConfig(),
    smoke=dict(
        models=("softmax", "decay 5"),
        batch_size=2,
        seq_len=6,
        vocab_size=6,
        width=8,
        num_seeds=2,
        num_steps=2,
        num_records=2,
    ),
    measure=study_lib.in_parts("sinks", measure),
    draw=draw,
    caption=(
        "Bigram-Backcopy. Left: share of texts and heads whose first token has"
        " a mean weight above .3, summed over two layers; without row sums it"
        " is a proxy, of weights divided by them. Right: loss on new texts."
        " Means over seeds and 95 % intervals (Student's t)."
    ),
    report_title="Attention systems",
)
