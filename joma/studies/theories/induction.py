"""Which layer of an induction head learns first?

Every sequence is a Markov chain over k symbols with transitions of its own,
each row drawn evenly from all distributions. A guess that knows nothing costs
ln k; the symbols' frequencies so far give that of a unigram, the frequencies of
what has followed the present symbol that of a bigram. Two layers that can do it
(as Edelman et al. reduce them, https://arxiv.org/abs/2402.11004),

  h_i = sum_j softmax_j(a_{i-j}) x_j,    p_i = sum_j softmax_j(x_i^T W h_j) x_j,
  logits = s ln(p_i + k / i),

over j up to i, counted from 1, one-hot x: the first attends by distance, the
second by content, and s is how much is made of what is read; k / i is what
little is known in the beginning. Bigrams need the first layer on the
symbol before (a_1 large) and the second one on a match (W diagonal, large).

Trained jointly from small values by SGD or Adam; and in stages, after the
algorithm for which Nichani et al. (https://arxiv.org/abs/2402.14735) prove that
such a structure is learned: the first layer alone, under a weak second one that
matches, and then the second one alone. **Derived here**: with W = 0 the second
layer weighs all alike, so that the first has no slope at all, and must follow.

Letters: B sequences, K symbols, R records, T symbols of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
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
  import optax

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from joma.studies.theories import markov_chains
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

WAYS = ("SGD", "Adam", "staged")
_SCALE = 0.01
# W of the first stage, times the identity.
_WEAK = 1.0
_FIRST_STAGE, _SECOND_STAGE = ("distance",), ("match", "strength")
_NUM_TEST = 1024
# Nats: how near a loss must be to count as one of the references.
_NEAR = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class InductionConfig:
  """Which layer of an induction head learns first?

  Attributes:
    num_seeds: Runs of each way to train.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_symbols: Symbols of a chain.
    length: Symbols of a sequence that are read.
    batch_size: Sequences of a step, drawn anew.
    num_steps: Steps of a run, a multiple of num_records.
    num_records: Records of a run.
    rate: Length of a step of SGD, times the gradient.
    adam_rate: Length of a step of Adam.
  """

  num_seeds: int = 5
  first_seed: int = 0
  num_symbols: int = 3
  length: int = 48
  batch_size: int = 64
  num_steps: int = 1200
  num_records: int = 100
  rate: float = 1.0
  adam_rate: float = 0.02

  def __post_init__(self):
    settings_lib.check_trained(self, "batch_size")
    require.between("num_symbols", self.num_symbols, 2, 64)
    require.between("length", self.length, 3, 1024)
    require.positive("adam_rate", self.adam_rate)


def start(config: InductionConfig, seed: int) -> dict[str, Any]:
  """Small values; nothing is made of what is read."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(_SCALE * rng.normal(size=shape))
  return {
      "distance": draw(config.length),
      "match": draw(config.num_symbols, config.num_symbols),
      "strength": jnp.zeros(()),
  }


def train(
    config: InductionConfig, way: str, seed: int
) -> dict[str, jaxtyping.Float[np.ndarray, "R"]]:
  """Trains from a seed; returns test losses, and how far layers are formed."""
  params = start(config, seed)
  half = config.num_records // 2
  stages: list[tuple[tuple[str, ...], int]] = [
      (tuple(params), config.num_records)
  ]
  if way == "staged":
    params["match"] = _WEAK * jnp.eye(config.num_symbols)
    params["strength"] = jnp.ones(())
    stages = [
        (_FIRST_STAGE, half),
        (_SECOND_STAGE, config.num_records - half),
    ]
  records, first = [], 0
  for names, number in stages:
    params, found = _train(
        config, way == "Adam", names, params, seed, first, number
    )
    records.append(found)
    first += number
  joined = {
      name: np.concatenate([record[name] for record in records])
      for name in records[0]
  }
  if not all(np.isfinite(value).all() for value in joined.values()):
    raise errors.UserError(
        f"training diverged by {way}: use a smaller rate, in a new workdir."
    )
  return joined


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 6))
def _train(
    config: InductionConfig,
    is_adam: bool,
    names: tuple[str, ...],
    params: dict[str, jax.Array],
    seed: int | jax.Array,
    first: int | jax.Array,
    number: int,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Trains the parameters of these names for some records."""
  rule = optax.scale_by_adam() if is_adam else optax.identity()
  rate = config.adam_rate if is_adam else config.rate
  every = config.num_steps // config.num_records
  for_test, for_steps = jax.random.split(jax.random.key(seed))
  sizes = (config.num_symbols, config.length)
  test = markov_chains.draw_chains(for_test, _NUM_TEST, *sizes)

  def step(state: Any, place: jax.Array) -> tuple[Any, None]:
    params, moments = state
    chains = markov_chains.draw_chains(
        jax.random.fold_in(for_steps, place), config.batch_size, *sizes
    )
    slope = jax.grad(markov_chains.mean_loss)(params, chains)
    direction, moments = rule.update(slope, moments)
    rates = {name: rate * (name in names) for name in params}
    moved = jax.tree.map(
        lambda value, rate, change: value - rate * change,
        params,
        rates,
        direction,
    )
    return (moved, moments), None

  def record(state: Any, place: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
    state, _ = jax.lax.scan(step, state, every * place + jnp.arange(every))
    found = {
        "loss": markov_chains.mean_loss(state[0], test),
        **markov_chains.formed(state[0]),
    }
    return state, found

  state = (params, rule.init(params))
  state, records = jax.lax.scan(record, state, first + jnp.arange(number))
  return state[0], records


def measure(
    config: InductionConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains by all ways from all seeds.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", by way: "loss", "layer 1" and "layer 2" [seeds, records]; "steps"
    of the records; "references", losses in nats; "claims" and "finding".
  """
  part = part or parts.at_once
  known = part("references", lambda: _references(config))
  rows = {way: part(way, lambda way=way: _runs(config, way)) for way in WAYS}
  every = config.num_steps // config.num_records
  steps = every * (1 + np.arange(config.num_records))
  told = _claims(rows, steps, known)
  return {
      "rows": rows,
      "steps": steps.tolist(),
      "references": known,
      "claims": told,
      "finding": claims.finding(told),
  }


def _references(config: InductionConfig) -> dict[str, float]:
  """Losses of counts, and of the layers when they are set by hand."""
  key = jax.random.key(config.first_seed + config.num_seeds)
  sizes = (config.num_symbols, config.length)
  chains = markov_chains.draw_chains(key, 4 * _NUM_TEST, *sizes)
  by_hand = {
      "distance": jnp.zeros(config.length).at[1].set(30.0),
      "match": 30.0 * jnp.eye(config.num_symbols),
      "strength": jnp.ones(()),
  }
  return {
      "nothing": float(np.log(config.num_symbols)),
      **markov_chains.references(np.asarray(chains), config.num_symbols),
      "layers set by hand": float(markov_chains.mean_loss(by_hand, chains)),
  }


def _runs(config: InductionConfig, way: str) -> dict[str, Any]:
  runs = [train(config, way, seed) for seed in settings_lib.seeds(config)]
  return {name: np.array([run[name] for run in runs]) for name in runs[0]}


def _claims(
    rows: Mapping[str, Mapping[str, Any]],
    steps: jaxtyping.Int[np.ndarray, "R"],
    known: Mapping[str, float],
) -> list[claims.Row]:
  losses = {way: np.asarray(rows[way]["loss"]) for way in WAYS}
  by_hand = known["layers set by hand"] - known["bigram"]
  told = [
      claims.row(
          "two such layers can tell bigrams",
          f"set by hand within {_NEAR} nats of the bigram",
          f"{by_hand:.4f} nats above it",
          abs(by_hand) < _NEAR,
      )
  ]
  for way in WAYS:
    ends = losses[way][:, -1] - known["bigram"]
    told.append(
        claims.row(
            f"training by {way} finds them",
            f"at the end within {_NEAR} nats of the bigram, from every seed",
            f"{_spread(ends)} nats above it",
            ends.max() < _NEAR,
        )
    )
  for way, is_long in (("SGD", True), ("Adam", False)):
    share = waiting(losses[way], known)
    told.append(
        claims.row(
            f"{way} waits at the unigram" if is_long else f"{way} does not",
            f"{'more' if is_long else 'less'} than .3 of the steps up to the"
            f" bigram are spent within {_NEAR} nats of it, from every seed",
            _spread(share),
            share.min() > 0.3 if is_long else share.max() < 0.3,
        )
    )
  for way in ("SGD", "Adam"):
    first, second = halfway(rows[way], steps)
    told.append(
        claims.row(
            f"by {way} layer 1 forms first, as in the staged algorithm",
            "halfway from chance to certain before layer 2, from every seed",
            f"layer 1 at {_spread(first)}, layer 2 at {_spread(second)} steps",
            (first < second).all(),
        )
    )
  return told


def waiting(
    losses: jaxtyping.Float[np.ndarray, "seeds R"], known: Mapping[str, float]
) -> jaxtyping.Float[np.ndarray, "seeds"]:
  """Share of the records up to the bigram that lie near the unigram."""
  is_there = losses < known["bigram"] + _NEAR
  end = np.where(is_there.any(axis=1), is_there.argmax(axis=1), losses.shape[1])
  near = np.abs(losses - known["unigram"]) < _NEAR
  before = np.arange(losses.shape[1]) < end[:, None]
  return (near & before).sum(axis=1) / np.maximum(end, 1)


def halfway(
    row: Mapping[str, Any], steps: jaxtyping.Int[np.ndarray, "R"]
) -> list[jaxtyping.Float[np.ndarray, "seeds"]]:
  """Steps at which each layer has gone half the way; infinite if never."""
  found = []
  for name in ("layer 1", "layer 2"):
    has = np.asarray(row[name]) > 0.5
    first = steps[has.argmax(axis=1)].astype(np.float64)
    found.append(np.where(has.any(axis=1), first, np.inf))
  return found


def _spread(values: jaxtyping.Float[np.ndarray, "_"]) -> str:
  return f"{values.min():.3g} to {values.max():.3g}"


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws losses, and how far layers are formed, along training."""
  rows, steps = summary["rows"], np.asarray(summary["steps"])
  of = lambda way, name: intervals.interval(np.asarray(rows[way][name]))
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 4.2)
    axes, *others = figure.subplots(2, 2, sharex=True).ravel()
    for way, look in drawing.looks_of(WAYS).items():
      drawing.draw_interval(axes, steps, of(way, "loss"), look, way)
    for name in ("nothing", "unigram", "bigram"):
      axes.axhline(summary["references"][name], color="black", ls=":", lw=0.8)
      axes.annotate(
          name,
          (steps[-1], summary["references"][name]),
          ha="right",
          va="bottom" if name == "nothing" else "top",
          fontsize=7,
      )
    lowest = summary["references"]["bigram"] - 0.1
    axes.set(ylabel="loss (nats)", xscale="log", ylim=(lowest, None))
    axes.legend()
    for axes, way in zip(others, WAYS, strict=True):
      for name, look in (
          ("layer 1", drawing.WITH),
          ("layer 2", drawing.WITHOUT),
      ):
        drawing.draw_interval(axes, steps, of(way, name), look, name)
      axes.set(title=way, ylim=(-0.05, 1.05), ylabel="from chance to certain")
      axes.legend()
    for axes in others[1:]:
      axes.set(xlabel="step")
  return figure


STUDY = study_lib.Study(
    title="Induction heads on random Markov chains",
    config=InductionConfig(),
    smoke=dict(num_seeds=2, length=6, batch_size=4, num_steps=4, num_records=4),
    measure=study_lib.in_parts("induction", measure),
    draw=draw,
    caption=(
        "Loss on new chains, and how far each layer is formed, trained jointly"
        " by SGD or Adam, or in stages: layer 1 for the first half of the"
        f" steps, layer 2 for the second. {study_lib.BANDS}"
    ),
    report_title="Theories of attention",
)
