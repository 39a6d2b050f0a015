"""Does a router of chunks keep needles as keys, and fold the rest away?

A text is chunks: some are needles, pairs of a key and its value, the others
filler, one symbol again and again, which the chunk itself foretells. Behind
them every key is asked, and its value said. NAtS-L
(https://arxiv.org/abs/2602.03681) keeps a chunk as keys and values or folds it
into a state; the loss of the answers alone teaches it which, without a budget.
What its cache holds when the first question comes is counted, states and the
chunk that grows included, a mean over texts; as many bytes or more are given to
softmax in a sliding window, and to a hybrid of three layers of the gated delta
rule to one of softmax, whose keys are what three states leave of them.

The figure shows right answers along training, and which chunks are kept.

Paper's settings: those of the system `nats`.
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
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from joma.studies import texts
  from joma.studies import training
  from joma.studies.systems.routing import needle_chunks
  from joma.studies.systems.subjects import two_prompts
  from joma.transformer import config as configs
  from joma.transformer import full_cache
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

ROUTED, WINDOW = "nats", "sliding window"
HYBRID = "3 gdn + 1 softmax"
_SOFTMAX = "convolved:width=4"
_LAYERS: dict[str, tuple[str, ...]] = {
    WINDOW: (_SOFTMAX,),
    HYBRID: ("gdn", "gdn", "gdn", _SOFTMAX),
}
MODELS = (ROUTED, *_LAYERS)
_KINDS = ("needle", "filler")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NatsConfig:
  """Does a router of chunks keep needles as keys, and fold the rest away?

  Attributes:
    others: What the router is held against.
    num_seeds: Runs of each model.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Steps of a run, a multiple of num_records.
    num_records: Records of each run.
    batch_size: Texts of a step.
    chunk: Tokens of a chunk, even.
    num_chunks: Chunks of a text, those of needles among them.
    num_needles: Chunks that are pairs.
    num_asked: Times that each key is asked.
    num_symbols: Keys that there are, and as many values, and filler symbols.
    width: Width of the residual stream, of one head of half as many channels.
    rate: Highest learning rate.
    num_test: Texts of each run by which routes are told.
  """

  others: tuple[str, ...] = tuple(_LAYERS)
  num_seeds: int = 3
  first_seed: int = 0
  num_steps: int = 400
  num_records: int = 20
  batch_size: int = 16
  chunk: int = 8
  num_chunks: int = 10
  num_needles: int = 1
  num_asked: int = 4
  num_symbols: int = 16
  width: int = 64
  rate: float = 5e-3
  num_test: int = 128

  def __post_init__(self):
    settings_lib.check_trained(
        self, "batch_size", "num_needles", "num_asked", "num_test"
    )
    settings_lib.require_choices("others", self.others, tuple(_LAYERS))
    settings_lib.require_multiple("chunk", self.chunk, 2)
    settings_lib.require_multiple("width", self.width, 4)
    # There is filler, too.
    require.between("num_chunks", self.num_chunks, self.num_needles + 1, 10**4)
    num_pairs = self.num_needles * self.chunk // 2
    require.between("num_symbols", self.num_symbols, num_pairs, 10**4)


def learner(
    config: NatsConfig, name: str, num_keys: int | None = None
) -> texts.Learner:
  """A model of `MODELS` and its task.

  Args:
    config: Sizes.
    name: Of the model.
    num_keys: Keys that its layer of softmax reads; None is all.
  """
  sizes = ("chunk", "num_chunks", "num_needles", "num_asked", "num_symbols")
  task = needle_chunks.Needles(
      **{size: getattr(config, size) for size in sizes}
  )
  layers = _LAYERS.get(name, (f"nats:chunk={config.chunk}",))
  windows = (0,) * (len(layers) - 1) + (num_keys,) if num_keys else ()
  model = configs.TransformerConfig(
      vocab_size=3 * config.num_symbols,
      num_layers=len(layers),
      embed_dim=config.width,
      num_heads=1,
      num_kv_heads=1,
      head_dim=config.width // 2,
      hidden_dim=2 * config.width,
      max_len=task.seq_len,
      attention=layers,
      windows=windows,
  )
  return texts.Learner(model=model, task=task, batch_size=config.batch_size)


def cache_bytes(model: configs.TransformerConfig, num_keys: int) -> int:
  """Of the cache of a text, with room for so many keys, float32."""
  init = lambda: full_cache.init(model, 1, num_keys, jnp.float32)
  leaves = jax.tree.leaves(jax.eval_shape(init))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def keys_within(model: configs.TransformerConfig, num_bytes: int) -> int:
  """The fewest keys whose cache has as many bytes, those of the text at most.

  Args:
    model: Has a layer of softmax.
    num_bytes: That there shall be at least.
  """
  each = cache_bytes(model, 2) - cache_bytes(model, 1)
  more = -(-(num_bytes - cache_bytes(model, 1)) // each)
  return min(max(1, 1 + more), model.max_len)


def measure(
    config: NatsConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains the router, then the others with as many bytes.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", of each model: "accuracy" of the last record and "scores" along
    training, intervals over seeds, with each seed's "accuracies", "bytes" of
    the cache, "num_keys" that softmax reads; of the router "auc" and the
    shares of "needle" and "filler" chunks that are kept, and "before" training
    likewise; "steps", "guess", "claims" and "finding".
  """
  part = part or parts.at_once
  rows = {ROUTED: part(ROUTED, lambda: _routed(config))}
  for name in config.others:
    model = learner(config, name).model
    num_keys = keys_within(model, int(rows[ROUTED]["bytes"]))
    run = lambda name=name, keys=num_keys: _windowed(config, name, keys)
    rows[name] = part(name, run)
  told = _claims(rows)
  return {
      "num_seeds": config.num_seeds,
      "guess": 1 / (config.num_needles * config.chunk // 2),
      "steps": rows[ROUTED]["steps"],
      "rows": rows,
      "claims": told,
      "finding": claims.finding(told),
  }


def _windowed(config: NatsConfig, name: str, num_keys: int) -> dict[str, Any]:
  what = learner(config, name, num_keys)
  plain = dataclasses.replace(what.model, windows=())
  held = {"bytes": cache_bytes(plain, num_keys), "num_keys": num_keys}
  return _curves(_trained(config, what)) | held


def _routed(config: NatsConfig) -> dict[str, Any]:
  what, seeds = learner(config, ROUTED), settings_lib.seeds(config)
  trained = _trained(config, what)
  look = jax.jit(_look, static_argnums=(0, 3))

  def told(params: Any, seed: int) -> dict[str, float]:
    key = jax.random.key(seed + 2**30)  # No key of training.
    prob, is_needle = map(np.asarray, look(what, params, key, config.num_test))
    return kept(prob, is_needle)

  share = lambda found: {
      name: intervals.interval(
          np.array([each[name] for each in found]), least=0, most=1
      )
      for name in ("auc", *_KINDS)
  }
  after = [told(trained.params_of(run), seed) for run, seed in enumerate(seeds)]
  before = [told(what.init(jax.random.key(seed)), seed) for seed in seeds]
  num_kept = float(np.mean([each["num_kept"] for each in after]))
  held = {"bytes": routed_bytes(what.model, num_kept), "num_kept": num_kept}
  return (
      _curves(trained)
      | share(after)
      | held
      | {"before": share(before), "aucs": [each["auc"] for each in after]}
  )


def routed_bytes(model: configs.TransformerConfig, num_kept: float) -> int:
  """Of the router's cache of a text with so many chunks of keys."""

  def with_room(slots: int) -> int:
    entries = tuple(f"{entry}:slots={slots}" for entry in model.attention)
    room = dataclasses.replace(model, attention=entries)
    return cache_bytes(room, model.max_len)

  one = with_room(1)
  return math.ceil(one + (num_kept - 1) * (with_room(2) - one))


def _look(
    what: texts.Learner, params: Any, key: jax.Array, num_texts: int
) -> tuple[jax.Array, jax.Array]:
  """The probability by which each chunk is kept, and which are needles."""
  assert isinstance(
      what.task, needle_chunks.Needles
  )  # `learner` gives no other.
  found, is_needle = what.task.drawn(key, num_texts)
  _, seen = what.transformer.apply(
      {"params": params}, found.tokens, mutable="intermediates"
  )
  sown: Any = seen["intermediates"]
  (prob,) = sown["layers_0"]["attn"][f"{ROUTED}_soft_prob"]
  return prob[:, :, 0], is_needle


def kept(prob: np.ndarray, is_needle: np.ndarray) -> dict[str, float]:
  """What a router does with chunks.

  Args:
    prob: By which each is kept [B, all chunks], those that are asked last.
    is_needle: Whether it is one [B, C].

  Returns:
    "auc" of needles before filler, shares of "needle" and "filler" chunks that
    are kept, and "num_kept" of a text when the first question comes.
  """
  ours = prob[:, : is_needle.shape[1]]
  is_kept = ours >= 0.5
  return {
      "auc": two_prompts.auc(ours[is_needle], ours[~is_needle]),
      "needle": float(is_kept[is_needle].mean()),
      "filler": float(is_kept[~is_needle].mean()),
      "num_kept": float(is_kept.sum(axis=1).mean()),
  }


def _trained(config: NatsConfig, what: texts.Learner) -> training.Trained:
  return training.train(
      what,
      settings_lib.seeds(config),
      schedule=training.Schedule(
          num_steps=config.num_steps, num_records=config.num_records
      ),
      rate=config.rate,
  )


def _curves(trained: training.Trained) -> dict[str, Any]:
  share = lambda values: intervals.interval(values, least=0, most=1)
  return {
      "accuracy": share(trained.scores[:, -1]),
      "accuracies": trained.scores[:, -1],
      "steps": trained.steps,
      "scores": share(trained.scores),
      "curves": trained.curves(),
  }


def _claims(rows: dict[str, dict[str, Any]]) -> list[claims.Row]:
  routed, text = rows[ROUTED], intervals.text
  kinds = ", ".join(f"{kind} {text(routed[kind])}" for kind in _KINDS)
  held = lambda name: f"{rows[name]['bytes']} bytes"
  right = lambda name: f"{name} {text(rows[name]['accuracy'])}, {held(name)}"
  apart = {
      name: intervals.interval(
          np.subtract(routed["accuracies"], rows[name]["accuracies"])
      )
      for name in rows
      if name != ROUTED
  }
  measured = lambda name: (
      f"{text(apart[name])}: {right(ROUTED)}; {right(name)}, which reads"
      f" {rows[name]['num_keys']} keys"
  )
  told = [
      claims.row(
          "needle chunks are stored as keys",
          "area under the curve against filler above .9",
          f"{text(routed['auc'])}, before training"
          f" {text(routed['before']['auc'])}; kept: {kinds}",
          routed["auc"]["mean"] > 0.9,
      )
  ]
  if WINDOW in rows:
    told.append(
        claims.row(
            "at equal cache bytes NAtS-L recalls more than a sliding window",
            "a gap of .1 or more, whose interval over seeds is above 0",
            measured(WINDOW),
            apart[WINDOW]["mean"] >= 0.1 and apart[WINDOW]["low"] > 0,
        )
    )
  if HYBRID in rows:
    told.append(
        claims.row(
            "at equal cache bytes NAtS-L recalls as much as three layers of the"
            " rule to one of softmax",
            "at most .03 less",
            measured(HYBRID),
            apart[HYBRID]["mean"] >= -0.03,
        )
    )
  return told


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws right answers along training; which chunks are kept beside."""
  rows, looks = summary["rows"], drawing.looks_of(MODELS)
  steps = np.asarray(summary["steps"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.8)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2)).tolist()
    for name, row in rows.items():
      label = f"{name}, {row['bytes'] / 1024:.1f} KiB"
      drawing.draw_interval(left, steps, row["scores"], looks[name], label)
    left.axhline(summary["guess"], color="black", linestyle=":")
    left.set(xlabel="step", ylabel="share of right answers", ylim=(0, 1.03))
    stages = (rows[ROUTED]["before"], rows[ROUTED])
    ways = (drawing.WITH, drawing.WITHOUT)
    for kind, way, shift in zip(_KINDS, ways, drawing.shifts(2), strict=True):
      points = drawing.points([stage[kind] for stage in stages])
      look = way._replace(linestyle="")
      drawing.draw_points(right, np.arange(2) + shift, points, look, kind)
    # Room for the legend above all bars.
    right.set(ylabel="share of chunks kept as keys", ylim=(-0.03, 1.25))
    right.set_yticks(np.arange(0, 1.1, 0.2))
    right.set_xticks(np.arange(2), ("before training", "after"))
    right.set_xlim(-0.5, 1.5)
    right.legend(loc="upper center", ncols=2)
    figures.put_legend_above(figure, figures.legend_entries(left))
  return figure


STUDY = study_lib.Study(
    title="Which chunks a router keeps as keys",
    config=NatsConfig(),
    smoke=dict(
        batch_size=2,
        chunk=2,
        num_chunks=3,
        num_needles=1,
        num_asked=1,
        num_symbols=2,
        width=8,
        num_test=4,
        num_seeds=2,
        num_steps=2,
        num_records=2,
    ),
    measure=study_lib.in_parts("nats", measure),
    draw=draw,
    caption=(
        "Left, share of asked keys that are answered by their value, along"
        " training, with bytes of the cache; dotted, a guess."
        f" {study_lib.BANDS} Right, share of needle and filler chunks that are"
        " kept as keys, means over seeds and 95 % intervals (Student's t)."
    ),
    report_title="Attention systems",
)
