"""Where does the theory's prediction of heavy hitters break on the way to text?

On Scan & Snap's data (https://arxiv.org/abs/2305.16380) what its equations say
of P(l|n) names the tokens that attention will keep; of a Transformer on text no
more than frequency does (`launch.bridge`). The rungs between change one thing
at a time: the data, the number of next tokens of a query, who asks, residual,
embeddings, MLP, optimizer. A context's heavy hitters are the quarter of its
places that attention is on most; each predictor names as many places, and its
recall is the share that it names rightly, a quarter by chance.

Letters: C places of a context, E contexts, R records, S seeds.
"""

from __future__ import annotations

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

  from joma.inference.bridge import recall
  from joma.studies import claims
  from joma.studies import parts
  from joma.studies.systems.bridge import contexts
  from joma.studies.systems.bridge import predictors
  from joma.studies.systems.bridge import rungs
  from joma.studies.systems.bridge import training
  from joma.studies.systems.bridge import verdict
  from joma.transformer.text import corpus as corpus_lib

# Contexts that tell what types get, for each that is measured.
_CALIBRATION = 3
_NUM_BYTES = 256
# Occurrences of a type whose attention is told from noise.
_NUM_SEEN = 8
# Seed of the samples that statistics are of, which no run draws from.
_STATISTICS = 10**6


@dataclasses.dataclass(frozen=True, kw_only=True)
class BridgeLadderConfig:
  """Where does the theory's prediction of heavy hitters break?

  Attributes:
    rungs: How many of the rungs, from the first: ten lead from Scan & Snap's
      data to a block on text, eight change the optimizer, and three
      are controls.
    num_seeds: Runs of each rung.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Steps of a run, a multiple of num_records.
    num_records: Records of a run.
    batch_size: Samples of a step.
    length: Tokens of a context.
    num_contexts: Contexts that each run is measured on.
    num_queries: Queries that ask each of them, where not its own does.
    num_batches: Batches that statistics are of.
    vocab_size: Word pieces of the text, more than 256; 256 takes its bytes.
    budget: Share of the places that are heavy hitters.
    rate: Factor of the rates of all rungs.
  """

  rungs: int = 21
  num_seeds: int = 10
  first_seed: int = 0
  num_steps: int = 400
  num_records: int = 20
  batch_size: int = 64
  length: int = 64
  num_contexts: int = 64
  num_queries: int = 32
  num_batches: int = 768
  vocab_size: int = 512
  budget: float = 0.25
  rate: float = 1.0

  def __post_init__(self):
    settings_lib.check_trained(self, "batch_size", "num_queries")
    require.between("rungs", self.rungs, 2, 21)
    require.between("length", self.length, 4, 4096)
    require.at_least("num_contexts", self.num_contexts, 2)
    require.between("num_batches", self.num_batches, 2, 10**6)
    require.between("vocab_size", self.vocab_size, _NUM_BYTES, 8192)
    if not 0 < self.budget < 1:
      raise errors.UserError(f"budget must lie in (0, 1), got {self.budget}.")

  @property
  def num_kept(self) -> int:
    """Heavy hitters of a context."""
    return max(1, round(self.budget * self.length))


def measure(
    config: BridgeLadderConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains all rungs, and asks every predictor.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", by rung: "recall" [S, R] of each predictor, "partial" [S, R], the
    rank correlation over types of the velocity with attention, given frequency,
    and "loss" [S, R]; "steps", "chance", what `verdict.conclude` gives, and
    "finding".
  """
  part = part or parts.at_once
  every = config.num_steps // config.num_records
  steps = [every * (i + 1) for i in range(config.num_records)]
  rows = {
      rung.name: part(
          rung.name, lambda rung=rung: _measure_rung(config, rung, steps)
      )
      for rung in rungs.RUNGS[: config.rungs]
  }
  concluded = verdict.conclude(rows)
  return {
      "rows": rows,
      "steps": steps,
      "chance": config.num_kept / config.length,
      **concluded,
      "finding": (
          f"{concluded['verdict']} {claims.finding(concluded['claims'])}"
      ),
  }


@functools.cache
def _corpus(vocab_size: int) -> corpus_lib.Corpus:
  kind = "bytes" if vocab_size == _NUM_BYTES else "bpe"
  return corpus_lib.load(tokenizer=kind, bpe_vocab_size=vocab_size)


@functools.cache
def _sources(
    data: str, num_next: int, vocab_size: int
) -> tuple[contexts.Source, contexts.Source]:
  """Where a rung trains, and where it is measured."""
  if data == "classes":
    return (contexts.Classes(),) * 2
  corpus = _corpus(vocab_size)
  size = corpus.vocab_size
  allowed = None
  if num_next:
    allowed = contexts.most_frequent_next(corpus.train, size, num_next)
  source = functools.partial(contexts.Text, num_tokens=size, allowed=allowed)
  if data == "bigrams":
    return (source(corpus.train, is_resampled=True),) * 2
  return source(corpus.train), source(corpus.valid)


@functools.lru_cache(maxsize=2)
def _statistics(
    config: BridgeLadderConfig, data: str, num_next: int, has_residual: bool
) -> predictors.Statistics:
  source, _ = _sources(data, num_next, config.vocab_size)
  rng = np.random.default_rng(_STATISTICS)
  shape = (config.num_batches, config.batch_size)
  batches = _draw(source, rng, shape, config.length)
  return predictors.measure(
      batches, source.num_tokens, has_residual=has_residual
  )


def _draw(
    source: contexts.Source,
    rng: np.random.Generator,
    shape: tuple[int, ...],
    length: int,
) -> training.Batches:
  samples = source.draw(rng, int(np.prod(shape)), length)
  return training.Batches(
      *(jnp.asarray(x.reshape(*shape, *x.shape[1:])) for x in samples)
  )


def _measure_rung(
    config: BridgeLadderConfig, rung: rungs.Rung, steps: list[int]
) -> dict[str, Any]:
  found = _statistics(config, rung.data, rung.num_next, rung.has_residual)
  runs = [
      _measure_run(config, rung, found, seed)
      for seed in settings_lib.seeds(config)
  ]
  recalls = {
      name: np.array([run["recall"][name] for run in runs])
      for name in runs[0]["recall"]
  }
  loss = np.array([run["loss"] for run in runs])
  curves = {name: value.mean(axis=0) for name, value in recalls.items()}
  return {
      "recall": recalls,
      "partial": np.array([run["partial"] for run in runs]),
      "loss": loss,
      "steps": steps,
      "curves": {"loss": loss.mean(axis=0), **curves},
  }


def _measure_run(
    config: BridgeLadderConfig,
    rung: rungs.Rung,
    found: predictors.Statistics,
    seed: int,
) -> dict[str, Any]:
  source, held_out = _sources(rung.data, rung.num_next, config.vocab_size)
  rng = np.random.default_rng(seed)
  shape = (
      config.num_records,
      config.num_steps // config.num_records,
      config.batch_size,
  )
  batches, twins = (_draw(source, rng, shape, config.length) for _ in range(2))
  asked = held_out.draw(
      rng, (1 + _CALIBRATION) * config.num_contexts, config.length
  )
  queries = asked.query[:, None]
  if rung.is_every_query:
    number = len(queries) * config.num_queries
    queries = source.draw(rng, number, config.length).query
    queries = queries.reshape(-1, config.num_queries)
  setting = training.Setting(
      source.num_tokens,
      rung.embeddings,
      rung.has_residual,
      rung.has_mlp,
      rung.optimizer,
      config.rate * rung.rate,
      config.num_steps // 2 if rung.is_decoder_first else 0,
  )
  probe = training.Probe(jnp.asarray(asked.context), jnp.asarray(queries))
  record = training.train(setting, jnp.int32(seed), batches, twins, probe)
  record = jax.tree.map(lambda x: np.asarray(x, np.float64), record)
  if not all(np.isfinite(leaf).all() for leaf in record):
    raise errors.UserError(
        f"training diverged on the rung {rung.name}: use a rate below"
        f" {config.rate:g}, in a new workdir."
    )
  return _read(config, found, asked.context, queries, record)


def _read(
    config: BridgeLadderConfig,
    found: predictors.Statistics,
    context: jaxtyping.Int[np.ndarray, "E C"],
    queries: jaxtyping.Int[np.ndarray, "E Q"],
    record: training.Record,
) -> dict[str, Any]:
  """Recalls of a run; the first contexts are measured, the others calibrate."""
  number, size = config.num_contexts, len(found.frequency)
  known = predictors.scores(found, context[:number], queries[:number])
  by_type = found.query_probs @ found.velocity
  seen = np.bincount(context[number:].ravel(), minlength=size) >= _NUM_SEEN
  rows: dict[str, list[float]] = {}
  partial = []
  for mass, flow in zip(record.mass, record.flow, strict=True):
    mean = recall.mean_by_type(mass[number:, None], context[number:], size)[0]
    named = {"type": mean[context[:number]], "flow": flow[:number], **known}
    for name, score in named.items():
      share = recall.recall(score, mass[:number], config.num_kept)
      rows.setdefault(name, []).append(float(share.mean()))
    partial.append(
        recall.partial_rank_correlation(
            by_type[seen], mean[seen], found.frequency[seen]
        )
    )
  return {"recall": rows, "partial": partial, "loss": record.loss.tolist()}


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws recalls by rung, early and at the end."""
  return verdict.draw(summary)


STUDY = study_lib.Study(
    title="The ladder from Scan & Snap's data to text",
    config=BridgeLadderConfig(),
    smoke=dict(
        rungs=3,
        num_seeds=2,
        num_steps=4,
        num_records=2,
        batch_size=4,
        length=8,
        num_contexts=4,
        num_queries=2,
        num_batches=2,
        vocab_size=256,
    ),
    measure=study_lib.in_parts("bridge_ladder", measure),
    draw=draw,
    caption=(
        "Recall of the heavy hitters by what predicts them, on rungs that"
        " differ from the one above, or from the one that they name, by one"
        " thing; at the first record and at the last. Velocity: the theory at"
        " the start, from statistics alone; settled, with a decoder that knows"
        " what there is to know without the context. Flow: integrated along"
        " training, under the decoder that was learned. Dotted: chance. Mean"
        " over seeds and its 95 % interval (Student's t)."
    ),
    report_title="From co-occurrence to heavy hitters",
)
