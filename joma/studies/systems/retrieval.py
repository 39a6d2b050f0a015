"""What is still found of a text of which few tokens are kept?

Texts are facts, `key value .`, and a question, a key said three times, each
time to be answered by its value. Small models of two layers learn it, the first
of which sees two tokens. No text is longer than those of training.

InfiniRetri (https://arxiv.org/abs/2502.12962) reads a text in chunks and
carries the sentences that the last layer attends to from the question; the
model then reads what is carried, and the question. It is compared with caches
of as many tokens, H2O, SnapKV and StreamingLLM, which read the text and the key
twice, evict, and are asked by the third; and with the attention of the first
layer in the place of the last one's.

Landmark attention (https://arxiv.org/abs/2305.16300) takes the full stops for
landmarks: a model that is trained with them in its second layer, and whose
first one sees three tokens, is read as it was trained, and with the question's
own block and the one that its landmark names, at the length of training and at
four times as many facts. A model of softmax that is read so is the twin: its
full stops are no landmarks.

Paper's settings: chunks of 1,024 tokens, of which the best 300 bring their
sentences (InfiniRetri's package); blocks of 50 tokens and a landmark.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from joma.systems.cache_policies import names as policy_names
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import once
  from joma.studies import parts
  from joma.studies import texts
  from joma.studies import training
  from joma.studies.systems.subjects import facts
  from joma.studies.systems.subjects import kept_tokens
  from joma.transformer import config as configs
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

# Facts of long texts over those of training.
_LONGER = 4
_WAYS = ("first layer", "infini_retri")
_READINGS = ("all blocks", "2 blocks", "all blocks, long", "2 blocks, long")
_TWIN = "softmax, 2 blocks"
# Right answers by the whole text above which a model has learned the task.
_LEARNED = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
  """What is still found of a text of which few tokens are kept?

  Attributes:
    num_seeds: Runs of each model.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Most steps of a run, a multiple of num_records; runs end sooner
      when they have learned the task.
    num_records: Records of each run.
    batch_size: Texts of a step.
    num_facts: Facts of a text.
    num_asked: Questions of a text in training.
    num_keys: Keys that there are, four times `num_facts` or more.
    num_values: Values that there are.
    width: Width of the residual stream.
    rate: Highest learning rate.
    chunk: Facts that are read at once.
    budget: Tokens that are kept, from which on no fact is added.
    policies: Caches to compare with.
    num_test: Texts that are asked of.
  """

  num_seeds: int = 3
  first_seed: int = 0
  num_steps: int = 800
  num_records: int = 16
  batch_size: int = 32
  num_facts: int = 10
  num_asked: int = 4
  num_keys: int = 40
  num_values: int = 32
  width: int = 64
  rate: float = 3e-3
  chunk: int = 4
  budget: int = 6
  policies: tuple[str, ...] = ("h2o", "snapkv", "streaming_llm")
  num_test: int = 64

  def __post_init__(self):
    settings_lib.check_trained(
        self, "batch_size", "num_asked", "num_test", "budget"
    )
    require.at_least("num_facts", self.num_facts, 4)
    require.between("num_keys", self.num_keys, _LONGER * self.num_facts, 10**4)
    require.between("num_values", self.num_values, 2, 10**4)
    require.between("chunk", self.chunk, 1, self.num_facts - 1)
    settings_lib.require_multiple("width", self.width, 4)
    for name in self.policies:
      policy_names.check(name)


def learner(config: RetrievalConfig, second: str, window: int) -> texts.Learner:
  """A model, its second layer's system, its first one's window; its task."""
  length = facts.SIZE * (config.num_facts + config.num_asked)
  model = configs.TransformerConfig(
      vocab_size=facts.FIRST_KEY + config.num_keys + config.num_values,
      num_layers=2,
      embed_dim=config.width,
      num_heads=2,
      num_kv_heads=2,
      head_dim=config.width // 2,
      hidden_dim=2 * config.width,
      max_len=length,
      windows=(window, 0),
      attention=("softmax", second),
  )
  sizes = ("num_facts", "num_asked", "num_keys", "num_values")
  task = facts.Facts(**{name: getattr(config, name) for name in sizes})
  return texts.Learner(model=model, task=task, batch_size=config.batch_size)


def _two_blocks() -> str:
  """Of the question's own block, and the best one."""
  return f"landmark:block={facts.SIZE}:k=2"


def measure(
    config: RetrievalConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains the models and asks them.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "found": share of right answers of each way of keeping tokens, and
    "landmark": of each way of reading, intervals over the seeds that learned
    the task, over all where fewer than two did; "num_learned" of each;
    "answers" of every seed; "num_kept", tokens that InfiniRetri carries, the
    most and the mean; "claims" and "finding".
  """
  part = part or parts.at_once
  kept = part("kept tokens", lambda: _kept_tokens(config))
  landmark = part("landmarks", lambda: _landmarks(config))
  answers = {
      "found": kept["found"],
      "landmark": {**landmark["found"], _TWIN: kept["found"].pop(_TWIN)},
  }
  whole = (kept["found"]["full"], landmark["found"][_READINGS[0]])
  has_learned = [np.array(x) > _LEARNED for x in whole]
  found = {
      "answers": answers,
      "num_learned": [int(x.sum()) for x in has_learned],
      "num_seeds": config.num_seeds,
      "num_kept": kept["num_kept"],
      "num_slots": config.budget + facts.SIZE - 1,
      "num_tokens": facts.SIZE * config.num_facts,
  }
  for (key, ways), has in zip(answers.items(), has_learned, strict=True):
    of = has if has.sum() > 1 else np.ones_like(has)
    found[key] = {
        name: intervals.interval(np.array(x)[of], least=0, most=1)
        for name, x in ways.items()
    }
  rows = _claims(config, found)
  return {**found, "claims": rows, "finding": claims.finding(rows)}


def _trained(config: RetrievalConfig, one: texts.Learner) -> training.Trained:
  return training.train(
      one,
      settings_lib.seeds(config),
      schedule=training.Schedule(
          num_steps=config.num_steps,
          num_records=config.num_records,
          target_score=0.99,
      ),
      rate=config.rate,
  )


def _test(config: RetrievalConfig, factor: int = 1) -> texts.Texts:
  """Texts of one question, the same for all models."""
  task = facts.Facts(
      num_facts=factor * config.num_facts,
      num_asked=1,
      num_keys=config.num_keys,
      num_values=config.num_values,
  )
  return task.draw(jax.random.key(10**6), config.num_test)


def _kept_tokens(config: RetrievalConfig) -> dict[str, Any]:
  one, test = learner(config, "softmax", 2), _test(config)
  trained = _trained(config, one)
  names = ("full", *config.policies)
  found: dict[str, list[float]] = {name: [] for name in (*names, *_WAYS)}
  counts: list[int] = []
  for run in range(config.num_seeds):
    params = trained.params_of(run)
    for name in names:
      found[name].append(
          kept_tokens.by_policy(one, params, test, name, config.budget)
      )
    for way, layer in zip(_WAYS, (0, -1), strict=True):
      share, lengths = kept_tokens.by_carrying(
          one, params, test, layer, config.chunk, config.budget
      )
      found[way].append(share)
      counts += lengths if way == _WAYS[-1] else []
  found[_TWIN] = _answers(one, trained, test, _two_blocks())
  return {
      "found": found,
      "num_kept": {"most": max(counts), "mean": float(np.mean(counts))},
      "num_steps": trained.num_steps,
      "steps": trained.steps,
      "curves": trained.curves(),
  }


def _landmarks(config: RetrievalConfig) -> dict[str, Any]:
  second = f"landmark:block={facts.SIZE}"
  one = learner(config, second, facts.SIZE)
  trained, found = _trained(config, one), {}
  for name in _READINGS:
    test = _test(config, _LONGER if "long" in name else 1)
    entry = _two_blocks() if name.startswith("2") else second
    found[name] = _answers(one, trained, test, entry)
  return {
      "found": found,
      "num_steps": trained.num_steps,
      "steps": trained.steps,
      "curves": trained.curves(),
  }


def _answers(
    one: texts.Learner, trained: training.Trained, test: texts.Texts, entry: str
) -> list[float]:
  """Each run's share of right answers with a system in its second layer."""
  shape = dataclasses.replace(one.model, attention=("softmax", entry))
  model = dataclasses.replace(one, model=shape).transformer
  answer = once.jit(lambda params, tokens: model.apply(params, tokens))
  shares = []
  for run in range(len(trained.num_steps)):
    logits: Any = answer({"params": trained.params_of(run)}, test.tokens)
    is_right = logits[:, -1].argmax(axis=-1) == test.targets[:, -1]
    shares.append(float(is_right.mean()))
  return shares


def _claims(config: RetrievalConfig, found: dict[str, Any]) -> list[claims.Row]:
  kept, landmark = found["found"], found["landmark"]
  text = lambda row: intervals.text(row, 3)
  mean = lambda row: row["mean"]
  best = max((kept[name] for name in config.policies), key=mean)
  others = ", ".join(f"{name} {text(kept[name])}" for name in config.policies)
  first, last = (kept[name] for name in _WAYS)
  at_once, two, long, two_long = (landmark[name] for name in _READINGS)
  return [
      claims.row(
          "the models answer by the whole text, and by all blocks",
          f"more than {_LEARNED} from each of {found['num_seeds']} seeds",
          " and ".join(map(str, found["num_learned"])),
          set(found["num_learned"]) == {found["num_seeds"]},
      ),
      claims.row(
          "InfiniRetri finds more than caches of as many tokens",
          f"more than each of {others}",
          text(last),
          mean(last) > mean(best),
      ),
      claims.row(
          "what it carries is bounded",
          f"at most {found['num_slots']} tokens",
          str(found["num_kept"]["most"]),
          found["num_kept"]["most"] <= found["num_slots"],
      ),
      claims.row(
          "the first layer's attention does not retrieve",
          f"less than half of {text(last)}",
          text(first),
          mean(first) < mean(last) / 2,
      ),
      claims.row(
          "landmarks: the best block alone answers as all do",
          f"within .05 of {text(at_once)}",
          text(two),
          mean(two) > mean(at_once) - 0.05,
      ),
      claims.row(
          f"landmarks: at {_LONGER} times as many facts too",
          "more than .9",
          f"{text(two_long)}, by all blocks {text(long)}",
          mean(two_long) > 0.9,
      ),
      claims.row(
          "full stops that were not trained to be landmarks are none",
          f"less than half of {text(two)}",
          text(landmark[_TWIN]),
          mean(landmark[_TWIN]) < mean(two) / 2,
      ),
  ]


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the share of right answers of each way."""
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.6)
    panels = figure.subplots(1, 2, sharey=True).tolist()
    for axes, (key, title) in zip(
        panels,
        (("found", "tokens that are kept"), ("landmark", "landmarks")),
        strict=True,
    ):
      for i, each in enumerate(summary["answers"][key].values()):
        axes.plot([i + 0.2] * len(each), each, "o", color="0.6", markersize=3)
      names = list(summary[key])
      look = drawing.WITH._replace(linestyle="")
      x = np.arange(len(names), dtype=float)
      values = drawing.points([summary[key][name] for name in names])
      drawing.draw_points(axes, x, values, look, "")
      axes.set_xticks(x, names, rotation=40, ha="right")
      axes.set(title=title)
    panels[0].set(ylabel="share of right answers", ylim=(0, 1.05))
  return figure


STUDY = study_lib.Study(
    title="What is still found of a text of which few tokens are kept",
    config=RetrievalConfig(),
    smoke=dict(
        num_facts=4,
        num_keys=16,
        num_values=4,
        width=8,
        chunk=2,
        budget=3,
        policies=("streaming_llm",),
        num_test=2,
        num_seeds=2,
        num_steps=2,
        num_records=2,
    ),
    measure=study_lib.in_parts("retrieval", measure),
    draw=draw,
    caption=(
        "Share of right answers about facts of a text. Left: by the whole text,"
        " by caches of a few tokens, and by what is carried from chunk to"
        " chunk. Right: by all blocks, and by the block that a landmark names."
        " Means over the seeds that learned the task, and 95 % intervals"
        " (Student's t); beside them, grey, every seed."
    ),
    report_title="Attention systems",
)
