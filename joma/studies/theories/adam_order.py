"""Which token does attention prefer under Adam?

On Scan & Snap's smallest data (https://arxiv.org/abs/2305.16380: two queries of
one next token each, ten common and ten distinct tokens of unlike frequency) the
theorems for SGD let the most frequent distinct token win; under Adam another
one does, by the learning rate. What the sign of the gradient alone predicts
(**derived here**): by Lemma 1 a token's logit moves along

  f_l (g_l - f_l f^T g),   g = Y (e_n - alpha).

Steps of one size let all rows of Y grow alike, so that g_l is the same g for
all distinct tokens of a class; the sign is then that of g / f^T g - f_l. Tokens
below this share rise, those above it fall, until all have the same: the sign
makes no token win, z_l + ln P(l) becomes equal, and the entropy over n distinct
tokens goes to ln n. Where the decoder has saturated before, all logits have
risen by the same steps, z_l is equal, and the most frequent token leads as it
did at the start. Beside it stands Adam without noise: on the expected batch of
endless contexts.

Letters: B samples, K classes, L distinct tokens of a class, M tokens, R rates,
S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax import config as scansnap_config
from scansnap_jax.experiment import errors
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
  from scansnap_jax import data as data_lib
  from scansnap_jax import dynamics
  from scansnap_jax import metrics
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

# An optimizer, and whether batches are drawn.
WAYS = {
    "Adam": ("adam", True),
    "Adam without noise": ("adam", False),
    "sign": ("sign", False),
    "SGD": ("sgd", True),
}
# Gradients below it have no sign: the rounding of a sum that is 0.
_NO_SIGN = 1e-7


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamOrderConfig:
  """Which token does attention prefer under Adam?

  Attributes:
    rates: Learning rates of both matrices, rising.
    num_seeds: Draws of the batches.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Steps of a run.
    batch_size: Samples of a step.
    seq_len: Tokens of a sample, the query among them.
  """

  rates: tuple[float, ...] = (0.03, 0.1, 0.2, 0.5, 1.0)
  num_seeds: int = 10
  first_seed: int = 0
  num_steps: int = 100
  batch_size: int = 128
  seq_len: int = 128

  def __post_init__(self):
    require.between("num_seeds", self.num_seeds, 2, 1000)
    settings_lib.require_seeds(self.first_seed, self.num_seeds)
    settings_lib.require_several("rates", self.rates)
    require.between("num_steps", self.num_steps, 1, 10**6)
    require.between("batch_size", self.batch_size, 1, 10**5)
    require.between("seq_len", self.seq_len, 2, 10**5)


@functools.cache
def _classes() -> data_lib.SequenceClasses:
  return data_lib.make_classes(scansnap_config.DataConfig(), 2)


def draw_batches(config: AdamOrderConfig, seed: int | None) -> tuple[
    jaxtyping.Float[np.ndarray, "steps B M"],
    jaxtyping.Int[np.ndarray, "steps B"],
]:
  """Token counts and classes of all steps; without a seed what is expected."""
  classes = _classes()
  if seed is None:
    index = np.tile(np.arange(classes.num_classes), (config.num_steps, 1))
    return classes.probs[index].astype(np.float32), index
  rng = np.random.default_rng(seed)
  shape = (config.num_steps, config.batch_size)
  index = rng.integers(classes.num_classes, size=shape)
  counts = rng.multinomial(config.seq_len - 1, classes.probs[index])
  return counts.astype(np.float32), index


@functools.partial(jax.jit, static_argnums=0)
def train(
    optimizer: str,
    rate: jaxtyping.Float[jax.Array, ""],
    counts: jaxtyping.Float[jax.Array, "steps B M"],
    query: jaxtyping.Int[jax.Array, "steps B"],
    label: jaxtyping.Int[jax.Array, "steps B"],
) -> jaxtyping.Float[jax.Array, "M M"]:
  """Trains from zeros along the mean of Lemma 1; returns Z."""
  size = counts.shape[-1]
  rule = {
      "adam": optax.scale_by_adam(),
      "sign": optax.stateless_with_tree_map(
          lambda slope, _: jnp.where(
              jnp.abs(slope) > _NO_SIGN, jnp.sign(slope), 0.0
          )
      ),
      "sgd": optax.identity(),
  }[optimizer]
  slopes = jax.vmap(dynamics.lemma1_gradients, in_axes=(None, None, 0, 0, 0))

  def step(state: Any, batch: tuple[jax.Array, ...]) -> tuple[Any, None]:
    params, moments = state
    mean = jax.tree.map(lambda x: x.mean(axis=0), slopes(*params, *batch))
    direction, moments = rule.update(mean, moments)
    params = jax.tree.map(
        lambda x, change: x + rate * change, params, direction
    )
    return (params, moments), None

  params = (jnp.zeros((size, size)), jnp.zeros((size, size)))
  state = (params, rule.init(params))
  return jax.lax.scan(step, state, (counts, query, label))[0][0][1]


def read(
    attn_logits: jaxtyping.Float[np.ndarray, "M M"],
) -> dict[str, jaxtyping.Float[np.ndarray, "K *L"]]:
  """What each class's query makes of its distinct tokens.

  Returns:
    "logits" [K, L], from the most to the least frequent token; "rank" [K] of
    the one with the largest share, 1 the most frequent; and "entropy" [K] of
    their shares, in nats.
  """
  classes = _classes()
  logits, shares = [], []
  for probs, query, is_own in zip(
      classes.probs, classes.query, classes.is_distinct, strict=True
  ):
    own = np.flatnonzero(is_own)[np.argsort(-probs[is_own], kind="stable")]
    z = np.asarray(attn_logits, np.float64)[query, own]
    weights = probs[own] * np.exp(z - z.max())
    logits.append(z)
    shares.append(weights / weights.sum())
  return {
      "logits": np.array(logits),
      "rank": 1.0 + np.argmax(shares, axis=1),
      "entropy": np.asarray(metrics.entropy(jnp.asarray(shares))),
  }


def measure(
    config: AdamOrderConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains by all ways at all rates.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", by way: "rank" and "entropy" [R, S, K], and "logits" [R, S, K, L],
    one seed where nothing is drawn; "rates"; "log_probs" [L]; "start", the
    entropy of untrained attention; "claims" and "finding".
  """
  part = part or parts.at_once
  rows = {way: part(way, lambda way=way: _runs(config, way)) for way in WAYS}
  classes = _classes()
  own = np.sort(classes.probs[0][classes.is_distinct[0]])[::-1]
  untrained = read(np.zeros((classes.num_tokens,) * 2))
  start = float(untrained["entropy"].mean())
  told = _claims(config, rows, start, len(own))
  return {
      "rows": rows,
      "rates": list(config.rates),
      "log_probs": np.log(own).tolist(),
      "start": start,
      "claims": told,
      "finding": claims.finding(told),
  }


def _runs(config: AdamOrderConfig, way: str) -> dict[str, Any]:
  optimizer, is_drawn = WAYS[way]
  classes = _classes()
  found: list[list[dict[str, Any]]] = [[] for _ in config.rates]
  for seed in settings_lib.seeds(config) if is_drawn else (None,):
    counts, index = draw_batches(config, seed)
    batches = [
        jnp.asarray(x)
        for x in (counts, classes.query[index], classes.label[index])
    ]
    for place, rate in enumerate(config.rates):
      attn_logits = np.asarray(train(optimizer, jnp.float32(rate), *batches))
      if not np.isfinite(attn_logits).all():
        raise errors.UserError(
            f"training diverged by {way} at rate {rate:g}: use smaller rates,"
            " in a new workdir."
        )
      found[place].append(read(attn_logits))
  return {
      name: np.array([[run[name] for run in runs] for runs in found])
      for name in ("rank", "entropy", "logits")
  }


def _claims(
    config: AdamOrderConfig,
    rows: Mapping[str, Mapping[str, Any]],
    start: float,
    num_distinct: int,
) -> list[claims.Row]:
  rates = np.array(config.rates)
  ranks = {way: np.asarray(rows[way]["rank"]) for way in WAYS}
  medians = {way: np.median(each, axis=(1, 2)) for way, each in ranks.items()}
  entropies = {way: np.asarray(rows[way]["entropy"]) for way in WAYS}
  listed = lambda x: ", ".join(f"{value:.3g}" for value in x)
  # Rates whose steps suffice to make up for unlike frequencies.
  slow = (rates * config.num_steps > np.log(num_distinct)) & (rates < 0.5)
  missing = np.log(num_distinct) - entropies["sign"].min(axis=(1, 2))
  told = [
      claims.row(
          "signs make the shares of distinct tokens equal",
          "entropy within .01 nats of its most, at rates below .5",
          f"{listed(missing[slow])} nats below it",
          (missing[slow] < 0.01).all(),
      )
  ]
  for way in ("sign", "Adam without noise"):
    off = np.abs(medians[way] - medians["Adam"])
    told.append(
        claims.row(
            f"{way} tells which rank leads under Adam",
            "off by one rank at most, at every rate (medians)",
            f"ranks {listed(medians[way])} where Adam has"
            f" {listed(medians['Adam'])}",
            (off <= 1).all(),
        )
    )
  logits = np.asarray(rows["Adam"]["logits"])
  spread = logits.max(axis=-1) - logits.min(axis=-1)
  last = ranks["Adam"][-1]
  told += [
      claims.row(
          "at the highest rate all logits rise alike, and the most frequent"
          " token leads",
          "logits within .5 of each other, and the first rank in nine classes"
          " of ten",
          f"within {spread[-1].max():.2f}; the first in"
          f" {(last == 1).sum()} of {last.size}",
          spread[-1].max() < 0.5 and (last == 1).mean() >= 0.9,
      ),
      claims.row(
          "at the lowest rate a rarer token leads",
          "ranks beyond the middle one, in every class",
          f"ranks {listed(np.unique(ranks['Adam'][0]))}",
          (ranks["Adam"][0] > num_distinct / 2).all(),
      ),
      claims.row(
          "by Adam attention spreads over distinct tokens, by SGD it does not",
          f"mean entropy above the start's {start:.3f} by Adam, and below it by"
          " SGD, at every rate",
          f"{listed(entropies['Adam'].mean(axis=(1, 2)))}; SGD"
          f" {listed(entropies['SGD'].mean(axis=(1, 2)))}",
          (entropies["Adam"].mean(axis=(1, 2)) > start).all()
          and (entropies["SGD"].mean(axis=(1, 2)) < start).all(),
      ),
  ]
  return told


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the leading rank by the rate, and logits by frequency."""
  rows, rates = summary["rows"], np.asarray(summary["rates"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.7)
    left, right = figure.subplots(1, 2)
    for way, look in drawing.looks_of([*WAYS]).items():
      ranks = np.asarray(rows[way]["rank"]).mean(axis=2)  # Over classes.
      if ranks.shape[1] < 2:
        drawing.draw_curve(left, rates, ranks[:, 0], look, way)
        continue
      found = [intervals.interval(each, least=1) for each in ranks]
      drawing.draw_points(left, rates, drawing.points(found), look, way)
    left.set(xlabel="learning rate", xscale="log", ylabel="leading rank")
    left.locator_params(axis="y", integer=True)
    left.invert_yaxis()
    log_probs = np.asarray(summary["log_probs"])
    logits = np.asarray(rows["Adam"]["logits"]).mean(axis=(1, 2))
    for rate, mean, look in zip(
        rates, logits, drawing.looks(len(rates)), strict=True
    ):
      label = f"rate {rate:g}"
      drawing.draw_curve(right, log_probs, mean - mean[0], look, label)
    right.plot(
        log_probs,
        log_probs[0] - log_probs,
        color="black",
        linestyle=":",
        label="equal shares",
    )
    right.set(xlabel=r"$\ln P(l|n)$", ylabel="logit above the first rank's")
    right.set_ylim(-2.2, None)
    right.legend(fontsize=7, ncols=2, loc="lower left")
    figures.put_legend_above(figure, figures.legend_entries(left))
  return figure


STUDY = study_lib.Study(
    title="The order of tokens under Adam",
    config=AdamOrderConfig(),
    smoke=dict(
        rates=(0.1, 1.0), num_seeds=2, num_steps=3, batch_size=4, seq_len=9
    ),
    measure=study_lib.in_parts("adam_order", measure),
    draw=draw,
    caption=(
        "Left: the rank by frequency of the distinct token with the largest"
        " share of attention, 1 the most frequent, by optimizer and rate; means"
        " over classes and seeds, 95 % interval (Student's t). Right: logits"
        " under Adam by frequency; dotted, those that make all shares equal."
    ),
    report_title="Theories of attention",
)
