"""Settings of an evaluation of KV-cache policies; imports no jax."""

import dataclasses
from typing import Literal

from joma.inference.evaluation.ruler import ruler_config
from joma.systems.cache_policies import names as policy_names
from joma.transformer.config import TransformerConfig
from scansnap_jax.experiment import require
from scansnap_jax.experiment.errors import UserError

# Steps of training whose examples are drawn together.
_TRAINED_AT_ONCE = 25

Reading = Literal["tokens", "context", "prompt"]
SYMBOLS = ("mqar", "induction", "copy", "count")
TEXTS = (
    "passkey",
    "niah_single",
    "niah_multikey",
    "niah_multivalue",
    "niah_multiquery",
    "variable_tracking",
    "common_words",
    "frequent_words",
    "long_generation",
)
PERPLEXITY = "perplexity"
RULER = "ruler"
TASKS = (*SYMBOLS, *TEXTS, PERPLEXITY, RULER)
# Whatever is asked for, these stand beside.
ALWAYS = policy_names.BESIDE


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
  """What is read, by which model, with which caches.

  Attributes:
    tasks: Tasks to evaluate, among mqar, induction, copy, count; passkey,
      niah_single, niah_multikey, niah_multivalue, niah_multiquery,
      variable_tracking, common_words, frequent_words, long_generation;
      perplexity; and ruler, all 13 tasks of RULER (arXiv 2404.06654), which
      stands alone. All but the first four want a model with a tokenizer.
    policies: Names of policies, each with settings of its own if need be, as
      h2o:score=ema:decay=0.98; quest; adakv:NAME, which shares the slots of
      that policy out among heads; criticalkv:NAME, which counts what values
      add as well; cam:NAME, which adds values that leave to
      others; dms:threshold=X:NAME, which lets go of what is worth less;
      by_layer:curve=rising:NAME, for layers with different numbers of slots;
      two_stage:NAME+OTHER, one after the other. full, window and random are
      always there.
    budgets: Slots of a KV head over the length of the text, in (0, 1].
    slots: Slots of a KV head, in place of budgets where given.
    num_seeds: Draws of examples.
    first_seed: First seed of the examples.
    batch_size: Examples of a draw, read side by side.
    length: Tokens T of a text at most; what is generated is not counted.
    reading: tokens takes the text in one by one, so that the policy acts from
      the first token on; context reads it at once up to the question and then
      that token by token; prompt reads all at once.
    protocol: How ruler reads: agnostic compresses the context once, question
      and answer come on top and evict nothing; aware compresses the question
      together with the context; decoding evicts from the first token on.
    ruler: Which of ruler's tasks are read, and how; its budgets stand for
      `budgets`.
    positions: What rotary positions count: absolute ones, or places in the
      cache.
    cache_dtype: How keys and values are stored.
    num_pairs: Key-value pairs of the task mqar.
    vocab_size: Symbols of the tasks mqar, induction, copy and count; a model
      that is given has its own.
    filler: Filler of texts with needles: sentences, or lines of the embedded
      text.
    corpus: Corpus of the task perplexity: a name, or a text file or folder. Its
      test text is cut into windows of which each seed draws others.
    texts: Text files for the task perplexity, in place of a corpus: the first
      `length` tokens of each are read.
    skip: Tokens at the start of each text whose losses do not count: at least
      1, which nothing predicts.
    shape: Shape of the model that is trained here where none is given. By
      default its first layer sees a token and the one before alone, as short
      convolutions do, with which recall is learned in minutes.
    attention: Systems laid over a model that is given, without parameters of
      their own, as in TransformerConfig: hip:k=512, one entry a layer, or a
      pattern. A model that is trained here has those of `shape`.
    train_steps: Steps of training the model, where none is given.
    train_batch: Examples of a training step.
    train_length: Tokens of a training example; 0 is `length`.
    lr: Highest learning rate of training the model.
    train_seed: Random seed for the initial values and the training examples.
  """

  tasks: tuple[str, ...] = ("mqar",)
  policies: tuple[str, ...] = policy_names.DEFAULT
  budgets: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.75)
  slots: tuple[int, ...] = ()
  num_seeds: int = 3
  first_seed: int = 0
  batch_size: int = 64
  length: int = 64
  reading: Reading = "tokens"
  protocol: ruler_config.Protocol = "agnostic"
  ruler: ruler_config.RulerConfig = ruler_config.RulerConfig()
  positions: Literal["absolute", "rolled"] = "absolute"
  cache_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
  num_pairs: int = 8
  vocab_size: int = 64
  filler: Literal["sentences", "shakespeare"] = "sentences"
  corpus: str = "tinyshakespeare"
  texts: tuple[str, ...] = ()
  skip: int = 1
  shape: TransformerConfig = TransformerConfig(
      num_layers=2,
      embed_dim=64,
      num_heads=2,
      num_kv_heads=1,
      head_dim=32,
      hidden_dim=128,
      windows=(2, 0),
  )
  attention: tuple[str, ...] = ()
  train_steps: int = 400
  train_batch: int = 32
  train_length: int = 0
  lr: float = 3e-3
  train_seed: int = 0

  def __post_init__(self):
    for task in self.tasks:
      if task not in TASKS:
        raise UserError(f"tasks={task} is none of {', '.join(TASKS)}.")
    if not self.tasks:
      raise UserError("tasks must name at least one.")
    if RULER in self.tasks and len(self.tasks) > 1:
      raise UserError(
          "tasks=ruler stands alone, for it has a protocol and budgets of its"
          " own: leave the other tasks to another run."
      )
    self.ruler.mapped()
    if self.protocol == "decoding" and self.ruler.scope not in (None, "head"):
      raise UserError(
          f"ruler.scope={self.ruler.scope} with protocol=decoding: a head that"
          " evicts from the first token on has slots of its own. Leave it out,"
          " or give protocol=agnostic or aware."
      )
    for name in ("num_seeds", "batch_size", "num_pairs"):
      require.at_least(name, getattr(self, name), 1)
    for name in ("train_steps", "train_batch"):
      require.at_least(name, getattr(self, name), 1)
    require.at_least("train_length", self.train_length, 0)
    require.seeds("first_seed", self.first_seed, self.num_seeds)
    require.seeds("train_seed", self.train_seed)
    require.at_least("length", self.length, 2)
    self._check_memory()
    require.positive("lr", self.lr)
    require.between("skip", self.skip, 1, self.length - 1)
    if not (self.slots or self.budgets):
      raise UserError("budgets must name at least one.")
    for budget in self.budgets:
      if not 0 < budget <= 1:
        raise UserError(
            f"budgets={budget} must lie in (0, 1]: slots over the"
            f" {self.length} tokens of a text."
        )
    for slots in self.slots:
      require.between("slots", slots, 1, self.length)
    asks_within = set(self.tasks) & {"mqar", "copy", "count"}
    if self.reading == "prompt" and asks_within:
      raise UserError(
          "reading=prompt takes a text in at once, and"
          f" {', '.join(sorted(asks_within))} ask within it: give"
          " reading=tokens or context."
      )

  def _check_memory(self) -> None:
    """Raises UserError for texts that no memory holds."""
    # An example: tokens, targets and gold, as drawn and side by side.
    for size, length, number in (
        ("batch_size", self.length, self.num_seeds),
        ("train_batch", self.train_length or self.length, _TRAINED_AT_ONCE),
    ):
      rows = getattr(self, size)
      require.memory(
          f"{size}={rows} of length={length}", 24 * rows * length * number
      )
    require.memory(f"train_steps={self.train_steps}", 4 * self.train_steps)

  def capacities(self) -> dict[int, float]:
    """Slots to budget, ascending."""
    if self.slots:
      return {slots: slots / self.length for slots in sorted(set(self.slots))}
    return {
        max(1, round(budget * self.length)): budget
        for budget in sorted(set(self.budgets))
    }

  def all_policies(self) -> tuple[str, ...]:
    """Those asked for behind those that are always there."""
    return tuple(dict.fromkeys((*ALWAYS, *self.policies)))


def smoke() -> EvaluateConfig:
  """Two policies in seconds, at a size at which numbers mean nothing."""
  return EvaluateConfig(
      policies=policy_names.COMPARED[:1],
      budgets=(0.25,),
      num_seeds=2,
      batch_size=2,
      length=16,
      num_pairs=2,
      vocab_size=12,
      shape=TransformerConfig(
          num_layers=1,
          embed_dim=8,
          num_heads=2,
          num_kv_heads=1,
          head_dim=32,
          hidden_dim=8,
      ),
      train_steps=2,
      train_batch=4,
  )


PRESETS = {"default": EvaluateConfig, "smoke": smoke}
