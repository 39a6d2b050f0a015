"""When does a head need a sink, and what makes the first token one?

A token with a flag, the trigger, is to say the mean of all tokens so far; every
other token is to say nothing (the task of https://arxiv.org/abs/2603.11487,
stated here from memory, with what follows derived here). Weights that sum to 1
cannot say nothing of tokens that all hold something, so softmax must look at
one that holds nothing: the first, where there is one. Derived: with w = 1 / t
on each of t tokens of D normal numbers, read by c I, the mean square error is

  (p (1 - c)^2 + (1 - p) c^2) E[D / t],   least at c = p: p (1 - p) E[D / t],

p being the share of triggers. Without a first token softmax ends there; ReLU of
the logits, whose weights may sum to 0, and softmax beside a learned logit that
belongs to no token, have no need of it.

With `--sink_need.model=DIR` a checkpoint reads texts without a begin token
(https://arxiv.org/abs/2603.06591 is about such sinks): at positions that begin
later, and with a token inside that is kept from seeing what is before it. What
makes a token a sink is not its position if the first stays one, and is that it
sees itself alone if the one inside becomes one.

Letters: B texts, D width, R runs, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
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
  import jaxtyping
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from joma.studies import training
  from joma.studies.systems.probes import first_tokens
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

# By name: how weights are made, and whether there is a first token.
VARIANTS = {
    "softmax, begin": ("softmax", True),
    "softmax": ("softmax", False),
    "ReLU, begin": ("relu", True),
    "ReLU": ("relu", False),
    "softmax, sink logit": ("sink", False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinkNeedConfig:
  """When does a head need a sink, and what makes the first token one?

  Attributes:
    width: Numbers that a token holds.
    length: Tokens of a text, the first one aside.
    share: Share of tokens that are triggers.
    num_seeds: Runs of each kind.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Steps of a run, a multiple of num_records.
    num_records: Records of a run.
    batch_size: Texts of a step.
    rate: Highest learning rate.
    model: Folder of a checkpoint, or its name on Hugging Face, as
      org/name@revision; read too where it is given.
    corpus: Text that it reads.
    num_texts: Texts that it reads.
    num_tokens: Tokens of each.
  """

  width: int = 8
  length: int = 16
  share: float = 0.25
  num_seeds: int = 4
  first_seed: int = 0
  num_steps: int = 2000
  num_records: int = 20
  batch_size: int = 256
  rate: float = 0.02
  model: str = ""
  corpus: str = "tinyshakespeare"
  num_texts: int = 8
  num_tokens: int = 64

  def __post_init__(self):
    settings_lib.check_runs(self)
    for name in ("width", "batch_size"):
      require.between(name, getattr(self, name), 1, 10**6)
    require.between("length", self.length, 2, 4096)
    require.between("num_texts", self.num_texts, 2, 10**6)
    require.between("num_tokens", self.num_tokens, 8, 4096)
    require.positive("rate", self.rate)
    if not 0 < self.share < 1:
      raise errors.UserError(f"share must lie in (0, 1), got {self.share}.")


def mean_square(config: SinkNeedConfig) -> float:
  """E[D / t], the mean square of a mean over t tokens, over a text."""
  return config.width * float(np.mean(1 / np.arange(1, config.length + 1)))


def floor(config: SinkNeedConfig) -> float:
  """The least loss without a first token, p (1 - p) E[D / t]."""
  return config.share * (1 - config.share) * mean_square(config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
  """One head on drawn texts: `training.Problem`.

  Attributes:
    config: Sizes.
    kind: Of its weights: "softmax", "relu", or "sink", which is softmax with a
      learned logit more.
    has_begin: Whether a token that holds nothing but its flag comes first.
  """

  config: SinkNeedConfig
  kind: str
  has_begin: bool

  def init(self, key: jax.Array) -> jaxtyping.PyTree:
    """Draws query, key and value projections, and the logit more."""
    width, keys = self.config.width, jax.random.split(key, 3)
    size = width + 3
    draw = lambda key, out: jax.random.normal(key, (size, out)) / size**0.5
    return {
        "query": draw(keys[0], 2 * width),
        "key": draw(keys[1], 2 * width),
        "value": draw(keys[2], width),
        "sink": jnp.zeros(()),
    }

  def draw(self, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws tokens [B, T, D + 3], which are triggers [B, T], and answers."""
    config, keys = self.config, jax.random.split(key)
    shape = (config.batch_size, config.length)
    held = jax.random.normal(keys[0], (*shape, config.width))
    trigger = jax.random.bernoulli(keys[1], config.share, shape)
    flags = jnp.stack([trigger, ~trigger, jnp.zeros(shape, bool)], axis=-1)
    tokens = jnp.concatenate([held, flags.astype(held.dtype)], axis=-1)
    number = jnp.arange(1, config.length + 1)[None, :, None]
    answers = held.cumsum(axis=1) / number * trigger[..., None]
    if self.has_begin:
      begin = jnp.zeros_like(tokens[:, :1]).at[..., -1].set(1)
      tokens = jnp.concatenate([begin, tokens], axis=1)
    return tokens, trigger, answers

  def attend(
      self, params: jaxtyping.PyTree, tokens: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Weights [B, T, S], and what they read [B, T, D], of drawn tokens."""
    query, key = (tokens @ params[name] for name in ("query", "key"))
    logits = query @ key.swapaxes(1, 2) / query.shape[-1] ** 0.5
    total = tokens.shape[1]
    is_seen = jnp.tril(jnp.ones((total, total), bool))[None]
    if self.kind == "relu":
      number = jnp.maximum(jnp.arange(total) + (not self.has_begin), 1)
      weights = jnp.where(is_seen, jax.nn.relu(logits), 0)
      weights = weights / number[None, :, None]
    else:
      logits = jnp.where(is_seen, logits, -jnp.inf)
      if self.kind == "sink":
        more = jnp.broadcast_to(params["sink"], (*logits.shape[:2], 1))
        logits = jnp.concatenate([logits, more], axis=-1)
      weights = jax.nn.softmax(logits, axis=-1)[..., :total]
    first = int(self.has_begin)
    return weights[:, first:], (weights @ (tokens @ params["value"]))[:, first:]

  def loss(
      self, params: jaxtyping.PyTree, key: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Mean over texts and tokens of the square of the error, twice."""
    tokens, _, answers = self.draw(key)
    error = jnp.square(self.attend(params, tokens)[1] - answers).sum(-1).mean()
    return error, error


def measure(
    config: SinkNeedConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains a head of every kind, and reads a checkpoint if one is named.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    By kind "losses" [R, records], and at the end "begin", what tokens that are
    no triggers give to the first one, "begin of triggers", and "total", the sum
    of the former's weights [R]; "steps", "floor", "nothing", the loss of always
    saying nothing; "checkpoint", empty without one, see `first_tokens`;
    "claims" and "finding".
  """
  part = part or parts.at_once
  rows = {
      name: part(name, lambda kind=kind: _train(config, *kind))
      for name, kind in VARIANTS.items()
  }
  real: dict[str, Any] = {}
  if config.model:
    real = part(
        "checkpoint",
        lambda: first_tokens.measure(
            config.model, config.corpus, config.num_texts, config.num_tokens
        ),
    )
  told = _of_heads(config, rows) + (first_tokens.rate(real) if real else [])
  return {
      "rows": rows,
      "steps": rows["softmax"]["steps"],
      "floor": floor(config),
      "nothing": config.share * mean_square(config),
      "checkpoint": real,
      "claims": told,
      "finding": claims.finding(told),
  }


def _train(
    config: SinkNeedConfig, kind: str, has_begin: bool
) -> dict[str, Any]:
  head = Head(config=config, kind=kind, has_begin=has_begin)
  seeds = settings_lib.seeds(config)
  schedule = training.Schedule(
      num_steps=config.num_steps, num_records=config.num_records
  )
  found = training.train(head, seeds, schedule=schedule, rate=config.rate)
  looks = [_look(head, found.params_of(run)) for run in range(len(seeds))]
  return {
      "losses": found.losses.tolist(),
      "steps": found.steps,
      "curves": found.curves(),
      **{name: [look[name] for look in looks] for name in looks[0]},
  }


def _look(head: Head, params: jaxtyping.PyTree) -> dict[str, float]:
  """Weights of texts that no run draws, means over tokens of a kind."""
  tokens, trigger, _ = head.draw(jax.random.key(2**31 - 1))
  weights, _ = jax.jit(head.attend)(params, tokens)
  mean = lambda values, chosen: float((values * chosen).sum() / chosen.sum())
  first = weights[..., 0] * head.has_begin
  return {
      "begin": mean(first, ~trigger),
      "begin of triggers": mean(first, trigger),
      "total": mean(weights.sum(axis=-1), ~trigger),
  }


def _of_heads(
    config: SinkNeedConfig, rows: Mapping[str, Mapping[str, Any]]
) -> list[claims.Row]:
  last = {name: np.array(row["losses"])[:, -1] for name, row in rows.items()}
  nothing, least = config.share * mean_square(config), floor(config)
  sinks = {name: np.array(row["begin"]) for name, row in rows.items()}
  at_triggers = np.array(rows["softmax, begin"]["begin of triggers"])
  learned = lambda name: claims.row(
      f"{name}: learns the task",
      f"loss below a twentieth of saying nothing, {nothing:.3f}, by every seed",
      training.interval_text(last[name], 4),
      last[name].max() < nothing / 20,
  )
  return [
      learned("softmax, begin"),
      claims.row(
          "softmax, begin: the first token is a sink of all but triggers",
          "more than .9 of the weight by every seed, under .1 by triggers",
          f"{sinks['softmax, begin'].min():.3f} at least,"
          f" {at_triggers.max():.3f} at most",
          sinks["softmax, begin"].min() > 0.9 and at_triggers.max() < 0.1,
      ),
      claims.row(
          "softmax: without a first token the loss stays at p (1 - p) E[D / t]",
          f"within 2 % of {least:.4f}",
          training.interval_text(last["softmax"], 4),
          np.abs(last["softmax"] / least - 1).max() < 0.02,
      ),
      learned("ReLU, begin"),
      claims.row(
          "ReLU, begin: no sink",
          "weight on the first token under .05 by every seed",
          f"{sinks['ReLU, begin'].max():.3f} at most",
          sinks["ReLU, begin"].max() < 0.05,
      ),
      learned("ReLU"),
      learned("softmax, sink logit"),
  ]


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws losses, the first token's weight, and a checkpoint's sinks."""
  rows, real = summary["rows"], summary["checkpoint"]
  looks = drawing.looks_of([*rows])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.9)
    panels = figure.subplots(1, 3 if real else 2)
    steps = np.asarray(summary["steps"])
    for name, row in rows.items():
      losses = intervals.interval(np.asarray(row["losses"]), is_positive=True)
      drawing.draw_interval(panels[0], steps, losses, looks[name], name)
    panels[0].axhline(summary["floor"], color="black", ls=":", lw=0.8)
    panels[0].set(xlabel="step", ylabel="mean square error", yscale="log")
    _draw_weights(panels[1], rows)
    if real:
      first_tokens.draw(panels[2], real)
    figures.put_legend_above(figure, figures.legend_entries(panels[0]))
  return figure


def _draw_weights(axes: Any, rows: Mapping[str, Mapping[str, Any]]) -> None:
  names = [name for name in rows if name.endswith("begin")]
  for place, key, mark in (
      (-0.1, "begin", "o"),
      (0.1, "begin of triggers", "s"),
  ):
    values = np.array([rows[name][key] for name in names])
    label = "of triggers" if key != "begin" else "of other tokens"
    axes.plot(
        np.repeat(np.arange(len(names)) + place, values.shape[1]),
        values.ravel(),
        mark,
        color="black",
        markerfacecolor="none" if mark == "s" else None,
        label=label,
    )
  axes.set_xticks(range(len(names)), names)
  axes.set(ylim=(-0.03, 1.03), xlim=(-0.5, len(names) - 0.5))
  axes.set_ylabel("weight on the first token")
  axes.legend(loc="center right")


STUDY = study_lib.Study(
    title="When a head needs a sink",
    config=SinkNeedConfig(),
    smoke=dict(
        width=2, length=4, num_seeds=2, num_steps=4, num_records=2, batch_size=4
    ),
    measure=study_lib.in_parts("sink_need", measure),
    draw=draw,
    caption=(
        "Left: error of one head that says the mean of what it saw at a trigger"
        " and nothing else; dotted: the least without a first token, p (1 - p)"
        " E[D / t]. Then what the first token gets after training, a mark a"
        " seed, and, of a checkpoint that reads texts without a begin token,"
        " attention on the first token by layer, on it when positions begin"
        " later, and on a token inside, which sees itself alone or all before"
        f" it. {study_lib.BANDS}"
    ),
    report_title="Theories of attention",
)
