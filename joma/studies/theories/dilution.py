"""Does attention focus, dilute and focus again?

Chen et al. (https://arxiv.org/abs/2605.01199) describe how one layer learns a
Markov chain from small values in cycles: embeddings condense to rank one while
attention stands still; attention focuses on frequent tokens; what it changes in
the embeddings dilutes the focus; and from new directions of the embeddings the
next cycle starts. JoMA (https://arxiv.org/abs/2310.00535) has attention grow
sparse and then dense again, once. The layer, on one batch of chains of one
matrix of transitions whose symbols are of unlike frequency,

  h_i = sum_j softmax_j(e_i^T Q K^T e_j) V e_j over j up to i,   logits = O h,

trains by gradient descent, all of it. While attention is even and all is small,
the slope of the logits is C_ln = E[b_l (1[next = n] - 1/k)] with b the shares
of symbols in the text so far (**derived here**): embeddings condense to the
first left singular vector of C. Falls and rises of entropy are counted when
they exceed a bound, from the last extreme.

Letters: B sequences, D width, K symbols, R records, S seeds, T symbols that
are read.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

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
  from scansnap_jax import metrics
  from scansnap_jax.experiment import figures

# Nats of entropy from the last extreme that make a fall or a rise.
_BOUND = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class DilutionConfig:
  """Does attention focus, dilute and focus again?

  Attributes:
    num_seeds: Draws of chain and start.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_symbols: Symbols of a chain.
    length: Symbols of a sequence that are read.
    num_sequences: Sequences, the same in every step.
    width: Width of the embeddings.
    scale: Deviation of the start.
    num_steps: Steps of a run, a multiple of num_records.
    num_records: Records of a run.
    rate: Length of a step, times the gradient.
  """

  num_seeds: int = 4
  first_seed: int = 0
  num_symbols: int = 8
  length: int = 16
  num_sequences: int = 64
  width: int = 16
  scale: float = 0.05
  num_steps: int = 8000
  num_records: int = 200
  rate: float = 0.7

  def __post_init__(self):
    settings_lib.check_trained(self)
    require.between("num_symbols", self.num_symbols, 3, 256)
    require.between("length", self.length, 2, 1024)
    require.between("num_sequences", self.num_sequences, 1, 10**5)
    require.between("width", self.width, 1, 4096)
    require.positive("scale", self.scale)


def draw_chains(
    config: DilutionConfig, seed: int
) -> jaxtyping.Int[np.ndarray, "B _"]:
  """Draws transitions about frequencies of 1 / rank, and sequences of them."""
  rng = np.random.default_rng(seed)
  size = config.num_symbols
  frequency = 1 / np.arange(1, size + 1)
  frequency /= frequency.sum()
  rows = rng.dirichlet(1.5 * size * frequency, size=size)
  chains = np.empty((config.num_sequences, config.length + 1), np.int32)
  chains[:, 0] = rng.choice(size, len(chains), p=frequency)
  for i in range(config.length):
    chances = np.cumsum(rows[chains[:, i]], axis=1)[:, :-1]
    place = rng.random((len(chains), 1))
    chains[:, i + 1] = (place > chances).sum(axis=1)
  return chains


def start(config: DilutionConfig, seed: int) -> dict[str, jax.Array]:
  """Draws all matrices."""
  rng = np.random.default_rng([seed, 1])
  width, size = config.width, config.num_symbols
  shapes = dict(
      embedding=(size, width),
      query=(width, width),
      key=(width, width),
      value=(width, width),
      output=(width, size),
  )
  return {
      name: jnp.asarray(config.scale * rng.normal(size=shape), jnp.float32)
      for name, shape in shapes.items()
  }


def attend(
    params: Mapping[str, jax.Array], chains: jaxtyping.Int[jax.Array, "B _"]
) -> tuple[
    jaxtyping.Float[jax.Array, "B T K"], jaxtyping.Float[jax.Array, "B T T"]
]:
  """Returns logits of the next symbol, and attention."""
  embedded = params["embedding"][chains[:, :-1]]
  query, key, value = (
      embedded @ params[name] for name in ("query", "key", "value")
  )
  attn_logits = jnp.einsum("BTD,BSD->BTS", query, key)
  is_past = jnp.tril(jnp.ones(attn_logits.shape[1:], bool))[None]
  attn_logits = jnp.where(is_past, attn_logits, -jnp.inf)
  attn_weights = jax.nn.softmax(attn_logits, axis=-1)
  return attn_weights @ value @ params["output"], attn_weights


def mean_loss(
    params: Mapping[str, jax.Array], chains: jaxtyping.Int[jax.Array, "B _"]
) -> jaxtyping.Float[jax.Array, ""]:
  """Cross-entropy, in nats."""
  log_probs = jax.nn.log_softmax(attend(params, chains)[0])
  return -jnp.take_along_axis(log_probs, chains[:, 1:, None], axis=2).mean()


class Record(NamedTuple):
  """Along training.

  Attributes:
    loss: In nats.
    entropy: Of attention, a mean over queries, in nats.
    rank: Of the embeddings, the exponential of their spectrum's entropy.
    on_frequent: Attention on the quarter of symbols that are the most frequent,
      above what even attention gives them.
    along: |cosine| of the embeddings' first direction with that of C.
  """

  loss: jaxtyping.Float[jax.Array, "*r"]
  entropy: jaxtyping.Float[jax.Array, "*r"]
  rank: jaxtyping.Float[jax.Array, "*r"]
  on_frequent: jaxtyping.Float[jax.Array, "*r"]
  along: jaxtyping.Float[jax.Array, "*r"]


def first_direction(
    chains: jaxtyping.Int[np.ndarray, "B _"], size: int
) -> jaxtyping.Float[np.ndarray, "K"]:
  """First left singular vector of C."""
  symbols = np.eye(size)[chains[:, :-1]]
  number = np.arange(1, symbols.shape[1] + 1)[:, None]
  shares = np.cumsum(symbols, axis=1) / number
  error = np.eye(size)[chains[:, 1:]] - 1 / size
  return np.linalg.svd(np.einsum("BTK,BTN->KN", shares, error))[0][:, 0]


@functools.partial(jax.jit, static_argnums=(3, 4))
def train(
    params: dict[str, jax.Array],
    chains: jaxtyping.Int[jax.Array, "B _"],
    direction: jaxtyping.Float[jax.Array, "K"],
    schedule: tuple[int, int],
    rate: float,
) -> Record:
  """Descends; the schedule has the number of records, and the steps of each."""
  size = len(direction)
  count = jax.nn.one_hot(chains[:, :-1], size)
  frequent = jnp.argsort(-count.sum(axis=(0, 1)))[: max(1, size // 4)]
  is_frequent = jnp.isin(chains[:, :-1], frequent)[:, None]
  number = jnp.arange(1, chains.shape[1])[None, :, None]
  is_past = jnp.tril(jnp.ones(chains[0, 1:].shape * 2, bool))[None]
  even = (is_past & is_frequent) / number

  def step(
      _: int | jax.Array, params: dict[str, jax.Array]
  ) -> dict[str, jax.Array]:
    slope = jax.grad(mean_loss)(params, chains)
    return jax.tree.map(lambda x, change: x - rate * change, params, slope)

  def record(
      params: dict[str, jax.Array], unused: None
  ) -> tuple[dict[str, jax.Array], Record]:
    del unused
    params = jax.lax.fori_loop(0, schedule[1], step, params)
    _, attn_weights = attend(params, chains)
    left, values, _ = jnp.linalg.svd(params["embedding"], full_matrices=False)
    spectrum = jnp.square(values) / jnp.square(values).sum()
    gain = (attn_weights * is_frequent - even).sum(axis=-1).mean()
    return params, Record(
        mean_loss(params, chains),
        metrics.entropy(attn_weights).mean(),
        jnp.exp(metrics.entropy(spectrum)),
        gain,
        jnp.abs(left[:, 0] @ direction),
    )

  return jax.lax.scan(record, params, None, length=schedule[0])[1]


def turns(curve: jaxtyping.Float[np.ndarray, "R"], bound: float) -> list[int]:
  """Finds where a curve turns, by more than a bound from the last extreme.

  Returns:
    Records of the extremes: the last one in front of the first fall, the end of
    that fall, the end of the rise after it, and so on; a movement that goes on
    to the end ends at the last extreme that there is.
  """
  found, best, is_falling = [], 0, False
  for i, value in enumerate(curve):
    away = value - curve[best] if is_falling else curve[best] - value
    if away > bound:
      found.append(best)
      is_falling, best = not is_falling, i
    elif away <= 0:
      best = i
  return [*found, best] if found else []


def measure(
    config: DilutionConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains from every seed.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    The fields of `Record` [S, R]; "steps"; "turns", records at which the
    entropy of each seed turns; "claims" and "finding".
  """
  part = part or parts.at_once
  every = config.num_steps // config.num_records
  runs = [
      part(f"seed {seed}", lambda seed=seed: _run(config, seed, every))
      for seed in settings_lib.seeds(config)
  ]
  rows = {name: np.array([run[name] for run in runs]) for name in runs[0]}
  places = [turns(curve, _BOUND) for curve in rows["entropy"]]
  told = _claims(rows, places)
  return {
      **rows,
      "steps": (every * (1 + np.arange(config.num_records))).tolist(),
      "turns": places,
      "claims": told,
      "finding": claims.finding(told),
  }


def _run(config: DilutionConfig, seed: int, every: int) -> dict[str, Any]:
  chains = draw_chains(config, seed)
  direction = first_direction(chains, config.num_symbols)
  record = train(
      start(config, seed),
      jnp.asarray(chains),
      jnp.asarray(direction, jnp.float32),
      (config.num_records, every),
      config.rate,
  )
  found: dict[str, Any] = {
      name: np.asarray(getattr(record, name)) for name in Record._fields
  }
  if not all(np.isfinite(value).all() for value in found.values()):
    raise errors.UserError(
        f"training diverged with rate={config.rate:g}: use a smaller one, in a"
        " new workdir."
    )
  return found


def _claims(
    rows: Mapping[str, jaxtyping.Float[np.ndarray, "S R"]],
    places: list[list[int]],
) -> list[claims.Row]:
  # The record at which the first fall exceeds the bound, and where it ends; the
  # start where there is none.
  has = [len(turn) > 1 for turn in places]
  crossed = [
      int(np.argmax(curve < np.maximum.accumulate(curve) - _BOUND))
      for curve in rows["entropy"]
  ]
  low = [turn[1] if ok else 0 for turn, ok in zip(places, has, strict=True)]
  before = [max(0, place - 1) for place in crossed]
  at = lambda name, when: np.array(
      [curve[i] for curve, i in zip(rows[name], when, strict=True)]
  )
  spread = lambda x: f"{x.min():.3g} to {x.max():.3g}"
  ranks, along = at("rank", before), at("along", before)
  number = np.array([max(0, len(turn) - 1) for turn in places])
  listed = ", ".join(map(str, number))
  counted = f"falls and rises by seed: {listed}"
  return [
      claims.row(
          "embeddings condense while attention stands still",
          f"rank below 1.5 before the entropy has fallen by {_BOUND} nats",
          spread(ranks),
          all(has) and ranks.max() < 1.5,
      ),
      claims.row(
          "to the first direction of co-occurrence",
          "|cosine| above .9 there",
          spread(along),
          all(has) and along.min() > 0.9,
      ),
      *(
          claims.row(
              f"attention is on frequent symbols where its focus {when}",
              "the most frequent quarter has more than by even attention",
              spread(at("on_frequent", place)),
              all(has) and at("on_frequent", place).min() > 0,
          )
          for when, place in (("begins", crossed), ("ends", low))
      ),
      claims.row(
          "the focus is diluted",
          f"a rise of more than {_BOUND} nats after the fall, every seed",
          counted,
          number.min() >= 2,
      ),
      claims.row(
          "a second cycle begins",
          "a second fall, every seed",
          counted,
          number.min() >= 3,
      ),
  ]


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws entropy and rank along training, a line a seed."""
  steps = np.asarray(summary["steps"])
  curves = {name: np.asarray(summary[name]) for name in ("entropy", "rank")}
  looks = drawing.looks(len(curves["entropy"]))
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.6)
    both = figure.subplots(1, 2)
    for axes, (name, rows) in zip(both, curves.items(), strict=True):
      for run, (curve, look) in enumerate(zip(rows, looks, strict=True)):
        axes.plot(
            steps,
            curve,
            color=look.color,
            ls=look.linestyle,
            label=f"run {run}",
        )
        if name == "entropy":
          here = summary["turns"][run]
          axes.plot(steps[here], curve[here], look.marker, color=look.color)
      axes.set(xlabel="step", xscale="log")
    both[0].set_ylabel("attention entropy (nats)")
    both[1].set_ylabel("rank of the embeddings")
    figures.put_legend_above(figure, figures.legend_entries(both[1]))
  return figure


STUDY = study_lib.Study(
    title="Focus and dilution of attention",
    config=DilutionConfig(),
    smoke=dict(
        num_seeds=2,
        length=4,
        num_sequences=3,
        width=3,
        num_steps=6,
        num_records=3,
    ),
    measure=study_lib.in_parts("dilution", measure),
    draw=draw,
    caption=(
        "One layer that learns a Markov chain from small values: entropy of"
        " attention with the extremes that are counted, and the rank of the"
        " embeddings."
    ),
    report_title="Theories of attention",
)
