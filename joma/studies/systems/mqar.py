"""Which mixers recall pairs, and from how far?

A text is pairs of a key and its value, then nothing but now and then a key,
once each, which is to be answered by its value: associative recall of many
pairs (https://arxiv.org/abs/2312.04927). Softmax keeps every pair; a state of
one size must hold them all, and the gated delta rule
(https://arxiv.org/abs/2412.06464) replaces what it holds at a key where linear
attention adds to it. A plain model of two layers is slow to form the circuit:
each is trained with short convolutions too, and recall is shown along training,
not at one budget alone. A gated convolution of L layers reads no farther back
than 22 L tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

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
  from joma.studies import texts
  from joma.studies import training
  from joma.transformer import config as configs
  from scansnap_jax.experiment import intervals

# Layers, and the systems of each.
MODELS: dict[str, tuple[int, tuple[str, ...]]] = {
    "softmax": (2, ()),
    "softmax + conv": (2, ("convolved:width=4",)),
    "lightning": (2, ("lightning",)),
    "lightning + conv": (2, ("lightning+convolved:width=4",)),
    "gdn": (2, ("gdn",)),
    "gated_conv": (2, ("gated_conv",)),
    "3 gdn + 1 softmax": (4, ("gdn", "gdn", "gdn", "softmax")),
}
_REACH = 22  # Tokens that a layer of `gated_conv` reads before its own.
_BEST, _CONV, _DELTA = "softmax + conv", "gated_conv", "gdn"
_LINEAR, _HYBRID = "lightning + conv", "3 gdn + 1 softmax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MqarConfig:
  """Which mixers recall pairs, and from how far?

  Attributes:
    models: Which are trained.
    num_seeds: Runs of each model.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Steps of a run, a multiple of num_records.
    num_records: Records of each run.
    batch_size: Texts of a step.
    seq_len: Tokens of a text.
    num_pairs: Pairs of a text, each asked once.
    num_keys: Keys that there are.
    num_values: Values that there are.
    width: Width of the residual stream, of two heads.
    rate: Highest learning rate.
    num_test: Texts of each run by which recall is told by distance.
  """

  models: tuple[str, ...] = tuple(MODELS)
  num_seeds: int = 3
  first_seed: int = 0
  num_steps: int = 600
  num_records: int = 20
  batch_size: int = 16
  seq_len: int = 64
  num_pairs: int = 8
  num_keys: int = 16
  num_values: int = 16
  width: int = 32
  rate: float = 3e-3
  num_test: int = 128

  def __post_init__(self):
    settings_lib.check_trained(self, "batch_size", "num_pairs", "num_test")
    settings_lib.require_choices("models", self.models, tuple(MODELS))
    require.at_least("width", self.width, 4)
    for name in ("num_keys", "num_values"):
      require.between(name, getattr(self, name), self.num_pairs, 10**4)
    if self.seq_len < 3 * self.num_pairs:
      raise errors.UserError(
          "seq_len must be three tokens or more a pair of"
          f" num_pairs={self.num_pairs}, got {self.seq_len}."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
  """Pairs, then each key once among tokens of nothing: `texts.Task`.

  Attributes:
    seq_len: T.
    num_pairs: Pairs of a text.
    num_keys: Keys are tokens from 0, values those behind, then nothing.
    num_values: How many.
  """

  seq_len: int
  num_pairs: int
  num_keys: int
  num_values: int

  def draw(self, key: jax.Array, num_texts: int) -> texts.Texts:
    """Draws texts; each key is asked once."""
    keys = jax.random.split(key, (4, num_texts))
    choose = lambda keys, count: jax.vmap(
        lambda key: jax.random.permutation(key, count)[: self.num_pairs]
    )(keys)
    key_of = choose(keys[0], self.num_keys)
    value_of = self.num_keys + choose(keys[1], self.num_values)
    first = jnp.stack([key_of, value_of], axis=-1).reshape(num_texts, -1)
    rest = self.seq_len - 2 * self.num_pairs
    place, which = choose(keys[2], rest), choose(keys[3], self.num_pairs)
    write = jax.vmap(lambda row, place, what: row.at[place].set(what))
    take = lambda x: jnp.take_along_axis(x, which, axis=1)
    nothing = jnp.full((num_texts, rest), self.num_keys + self.num_values)
    asked = write(nothing, place, take(key_of))
    answers = write(jnp.zeros_like(nothing), place, take(value_of))
    tokens = jnp.concatenate([first, asked], axis=1)
    targets = jnp.concatenate([jnp.zeros_like(first), answers], axis=1)
    is_asked = (targets > 0) & (tokens < self.num_keys)
    return texts.Texts(tokens, targets, is_asked, is_asked)


def distances(found: texts.Texts, num_pairs: int) -> jax.Array:
  """Tokens between each asked key and the same key of its pair, [B, T]."""
  tokens = found.tokens
  same = tokens[:, :, None] == tokens[:, None, : 2 * num_pairs : 2]
  first = 2 * same.argmax(axis=-1)
  return jnp.arange(tokens.shape[1])[None] - first


def learner(config: MqarConfig, name: str) -> texts.Learner:
  """A model of `MODELS` and its task."""
  num_layers, attention = MODELS[name]
  model = configs.TransformerConfig(
      vocab_size=config.num_keys + config.num_values + 1,
      num_layers=num_layers,
      embed_dim=config.width,
      num_heads=2,
      num_kv_heads=2,
      head_dim=config.width // 2 // 2 * 2,
      hidden_dim=2 * config.width,
      max_len=config.seq_len,
      attention=attention,
  )
  sizes = ("seq_len", "num_pairs", "num_keys", "num_values")
  task = Pairs(**{name: getattr(config, name) for name in sizes})
  return texts.Learner(
      model=model,
      task=task,
      batch_size=config.batch_size,
      implementation="xla",
  )


def measure(
    config: MqarConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains the models.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", of each model: "accuracy" of the last record, "near" and "far",
    recall of keys within 44 tokens and farther, intervals over seeds, with each
    seed's; "first" steps above .9 and how many seeds "reached" it; "scores"
    along training; "steps", "guess", "claims" and "finding".
  """
  part = part or parts.at_once
  rows = {
      name: part(name, lambda n=name: _run(config, n)) for name in config.models
  }
  told = _claims(config, rows)
  return {
      "num_seeds": config.num_seeds,
      "guess": 1 / config.num_pairs,
      "steps": rows[config.models[0]]["steps"],
      "rows": rows,
      "claims": told,
      "finding": claims.finding(told),
  }


def _run(config: MqarConfig, name: str) -> dict[str, Any]:
  problem, seeds = learner(config, name), settings_lib.seeds(config)
  trained = training.train(
      problem,
      seeds,
      schedule=training.Schedule(
          num_steps=config.num_steps, num_records=config.num_records
      ),
      rate=config.rate,
  )
  first, reached = training.first_above(trained, 0.9)
  look = jax.jit(_by_distance, static_argnums=(0, 3))
  found = []
  for run, seed in enumerate(seeds):
    key = jax.random.key(seed + 2**30)  # No key of training.
    params = trained.params_of(run)
    found.append(np.array(look(problem, params, key, config.num_test)))
  near, far = np.stack(found, axis=1)
  share = lambda values: intervals.interval(values, least=0, most=1)
  return {
      "accuracy": share(trained.scores[:, -1]),
      "accuracies": trained.scores[:, -1],
      "near": share(near),
      "far": share(far),
      "first": first,
      "reached": reached,
      "steps": trained.steps,
      "scores": share(trained.scores),
      "curves": trained.curves(),
  }


def _by_distance(
    problem: texts.Learner, params: Any, key: jax.Array, num_texts: int
) -> tuple[jax.Array, jax.Array]:
  """Recall of keys that two layers of `gated_conv` see, and of the others."""
  assert isinstance(problem.task, Pairs)  # `learner` gives no other.
  found = problem.task.draw(key, num_texts)
  logits: Any = problem.transformer.apply({"params": params}, found.tokens)
  is_right = logits.argmax(axis=-1) == found.targets
  is_near = distances(found, problem.task.num_pairs) <= 2 * _REACH
  mean = lambda where: (is_right & where).sum() / jnp.maximum(where.sum(), 1)
  return mean(found.is_asked & is_near), mean(found.is_asked & ~is_near)


def _claims(
    config: MqarConfig, rows: dict[str, dict[str, Any]]
) -> list[claims.Row]:
  told, guess = [], 1 / config.num_pairs
  mean = lambda name, key="accuracy": rows[name][key]["mean"]
  text = lambda name, key="accuracy": intervals.text(rows[name][key])
  has = lambda *names: all(name in rows for name in names)
  if has(_BEST):
    told.append(
        claims.row(
            "softmax with short convolutions recalls",
            "above .95 of the keys",
            text(_BEST),
            mean(_BEST) > 0.95,
        )
    )
  if has(_DELTA):
    told.append(
        claims.row(
            f"the gated delta rule recalls {config.num_pairs} pairs, fewer than"
            " its keys have channels",
            "above .95 of the keys",
            text(_DELTA),
            mean(_DELTA) > 0.95,
        )
    )
  if has(_DELTA, _LINEAR):
    apart = np.array(rows[_DELTA]["accuracies"]) - np.array(
        rows[_LINEAR]["accuracies"]
    )
    told.append(
        claims.row(
            "linear attention that fades, with the same convolution and a state"
            " of the same size, recalls less",
            "less from every seed",
            f"lightning {text(_LINEAR)}, gdn {text(_DELTA)}",
            bool((apart > 0).all()),
        )
    )
  if has(_CONV):
    told += [
        claims.row(
            "two layers of gated convolutions recall keys within 44 tokens",
            f"at least .10 above {guess:.2f}, a guess",
            text(_CONV, "near"),
            mean(_CONV, "near") > guess + 0.1,
        ),
        claims.row(
            "and guess where the pair is farther",
            f"at most .05 above {guess:.2f}",
            text(_CONV, "far"),
            mean(_CONV, "far") < guess + 0.05,
        ),
    ]
  if has(_HYBRID, _BEST):
    told.append(
        claims.row(
            "three layers of the rule to one of softmax recall as softmax does",
            "at most .03 below softmax with convolutions",
            f"hybrid {text(_HYBRID)}, softmax {text(_BEST)}",
            mean(_HYBRID) > mean(_BEST) - 0.03,
        )
    )
  return told


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the share of right answers along training."""
  return drawing.draw_recall(summary, list(MODELS), 3.2)


STUDY = study_lib.Study(
    title="Associative recall of mixers along training",
    config=MqarConfig(),
    smoke=dict(
        models=("softmax + conv", "gated_conv"),
        batch_size=2,
        seq_len=8,
        num_pairs=2,
        num_keys=4,
        num_values=4,
        width=8,
        num_test=4,
        num_seeds=2,
        num_steps=2,
        num_records=2,
    ),
    measure=study_lib.in_parts("mqar", measure),
    draw=draw,
    caption=(
        "Share of asked keys that are answered by their value, along training."
        f" Dotted: a guess among the values of the text. {study_lib.BANDS}"
    ),
    report_title="Attention systems",
)
