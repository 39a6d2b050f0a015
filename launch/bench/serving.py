"""Measures a batch that sequences join and leave against one after the other.

  python -m launch.bench.serving --model=SmolLM2-135M --output=bench.json

Requests have prompts of several lengths and want several numbers of tokens.
They are answered one after the other, in a batch of `num_rows` rows, and in
batches of as many that begin and end together. In turns, see
`launch.bench.harness`; `same_answers` says how many of the answers are the same
tokens, which batches of other sizes round differently. Then requests get a
common beginning, which is read once or with each of them.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import operator
from typing import NamedTuple

from jaxtyping import PyTree
import numpy as np

from launch.bench import harness
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

_PAUSE_S = 0.2
_ALONE, _ROWS, _GROUPS = "one after the other", "rows", "groups"
_EACH, _ONCE = "prefix read with each", "prefix read once"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """What to measure, and its sizes.

  Attributes:
    num_requests: Sequences that are answered in a turn.
    num_rows: Rows of the batch.
    prompt_lens: Least and greatest number of tokens of a prompt.
    new_tokens: Least and greatest number of tokens that are wanted.
    prefix_len: Tokens of the common beginning; 0 leaves it out.
    num_rounds: Rounds, of which the median counts.
    seed: Random seed for the requests, which are random tokens.
  """

  num_requests: int = 16
  num_rows: int = 8
  prompt_lens: tuple[int, ...] = (8, 64)
  new_tokens: tuple[int, ...] = (16, 64)
  prefix_len: int = 256
  num_rounds: int = 3
  seed: int = 0

  def __post_init__(self):
    for name in ("num_requests", "num_rows", "num_rounds"):
      require.at_least(name, getattr(self, name), 1)
    require.at_least("prefix_len", self.prefix_len, 0)
    for name in ("prompt_lens", "new_tokens"):
      sizes = getattr(self, name)
      if len(sizes) != 2 or not 1 <= sizes[0] <= sizes[1]:
        raise errors.UserError(
            f"{name}={','.join(map(str, sizes))} must be two numbers from 1,"
            " the least first."
        )
    require.seeds("seed", self.seed)

  @property
  def num_positions(self) -> int:
    """Of the longest text."""
    return self.prefix_len + self.prompt_lens[1] + self.new_tokens[1]


class Request(NamedTuple):
  """A prompt, and how many tokens it is to be followed by."""

  prompt: list[int]
  num_new: int


class Subject(NamedTuple):
  """A model, and caches of one size for whoever uses it."""

  model: PyTree
  params: PyTree
  make_caches: Callable[..., PyTree]


Answers = list[list[int]]


def measure(folder: str, config: BenchConfig) -> harness.Row:
  """Makes and prints the measurements."""
  subject = _subject(folder, config)
  requests = _requests(subject.model.config.vocab_size, config)
  num_tokens = sum(request.num_new for request in requests)
  rows = _in_turns(
      {
          _ALONE: functools.partial(_alone, subject, requests),
          _GROUPS: functools.partial(_groups, subject, requests, config),
          _ROWS: functools.partial(_rows, subject, requests, config),
      },
      num_tokens,
      config,
  )
  result = {"config": dataclasses.asdict(config), "rows": rows}
  harness.tell("requests", result)
  if config.prefix_len:
    prefix = _prefix(subject.model.config.vocab_size, config)
    result["prefix"] = _in_turns(
        {
            _EACH: functools.partial(
                _rows, subject, _behind(prefix, requests), config
            ),
            _ONCE: functools.partial(
                _rows, subject, requests, config, prefix=prefix
            ),
        },
        num_tokens,
        config,
    )
    harness.tell("prefix", {"rows": result["prefix"]})
  return result


def _in_turns(
    turns: dict[str, Callable[[], Answers]],
    num_tokens: int,
    config: BenchConfig,
) -> list[harness.Row]:
  """Takes turns; the first compiles, and its answers are compared."""
  answers = {name: turn() for name, turn in turns.items()}
  first = next(iter(answers))
  seconds = harness.take_turns(
      turns, config.num_rounds, num_warm_ups=0, pause_s=_PAUSE_S
  )
  return [
      {
          "name": name,
          "tokens_per_sec": num_tokens / float(np.median(times)),
          "seconds": float(np.median(times)),
          "times_faster": 1 / harness.ratio(times, seconds[first]),
          "same_answers": sum(map(operator.eq, answers[name], answers[first])),
      }
      for name, times in seconds.items()
  ]


def _subject(folder: str, config: BenchConfig) -> Subject:
  from joma.transformer import full_cache
  from joma.transformer import model as models
  from joma.transformer.hf import pretrained
  from joma.transformer.text import sizes

  shape, params = pretrained.load(folder)
  capacity = sizes.capacity(config.num_positions, shape)
  make = functools.partial(full_cache.init, shape, capacity=capacity)
  return Subject(models.Transformer(shape), params, make)


def _requests(vocab_size: int, config: BenchConfig) -> list[Request]:
  rng = np.random.default_rng(config.seed)
  between = lambda sizes: int(rng.integers(sizes[0], sizes[1] + 1))
  return [
      Request(
          rng.integers(0, vocab_size, between(config.prompt_lens)).tolist(),
          between(config.new_tokens),
      )
      for _ in range(config.num_requests)
  ]


def _prefix(vocab_size: int, config: BenchConfig) -> list[int]:
  rng = np.random.default_rng([config.seed, 1])
  return rng.integers(0, vocab_size, config.prefix_len).tolist()


def _behind(prefix: list[int], requests: list[Request]) -> list[Request]:
  return [Request([*prefix, *prompt], num) for prompt, num in requests]


def _alone(subject: Subject, requests: Sequence[Request]) -> Answers:
  """Each by itself, as `launch.generate` with one prompt."""
  from joma.inference import generate

  return [
      generate.generate(
          subject.model,
          subject.params,
          [request.prompt],
          max_new_tokens=request.num_new,
          kv_cache=subject.make_caches(batch_size=1),
      )[0].tolist()
      for request in requests
  ]


def _groups(
    subject: Subject, requests: Sequence[Request], config: BenchConfig
) -> Answers:
  """Batches that last as long as the longest answer of each."""
  from joma.inference import generate

  answers = []
  for start in range(0, len(requests), config.num_rows):
    group = requests[start : start + config.num_rows]
    rows = generate.generate(
        subject.model,
        subject.params,
        [request.prompt for request in group],
        max_new_tokens=max(request.num_new for request in group),
        kv_cache=subject.make_caches(batch_size=len(group)),
    )
    answers += [
        row[: request.num_new].tolist()
        for row, request in zip(rows, group, strict=True)
    ]
  return answers


def _rows(
    subject: Subject,
    requests: Sequence[Request],
    config: BenchConfig,
    prefix: Sequence[int] = (),
) -> Answers:
  """A batch that is kept full."""
  from joma.inference.serving import batch as batches
  from joma.inference.serving import queue

  batch = batches.Batch(*subject, config.num_rows)
  read = batch.read(prefix) if prefix else None
  answers = [[] for _ in requests]
  wanted = [queue.Request(*request, read) for request in requests]
  for number, token in queue.serve(batch, wanted):
    answers[number].append(token)
  return answers


if __name__ == "__main__":
  _MODEL = harness.define_model(
      "Folder of the model, or its name on Hugging Face.", is_required=True
  )
  harness.run(BenchConfig(), lambda config: measure(_MODEL.value, config))
