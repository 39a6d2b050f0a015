"""RULER's examples through kvpress and through ours, by the same protocol.

  python -m launch.bench.language.ruler_peer --model=DIR --output=ruler.json

Each example's ids are the same for both: the context is read and compressed
before anybody knows the question, question and answer come on top, and nothing
more leaves (protocol `agnostic`). kvpress keeps as many keys of a text as ours
does. A row is a task and a policy: the sum of each one's scores over the
examples, and how many answers are the same tokens.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from joma.inference.evaluation import evaluate_config
from joma.inference.evaluation.protocols import reading
from joma.inference.evaluation.protocols import ruler_grid
from joma.inference.evaluation.protocols import ruler_subject
from joma.inference.evaluation.ruler import ruler_config
from joma.inference.evaluation.ruler import scoring
from joma.inference.evaluation.ruler import written as written_lib
from joma.systems.cache_policies import names as policy_names
from launch.bench import harness
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """What to read.

  Attributes:
    tasks: Tasks of RULER that are read.
    policies: Cache policies that kvpress has as presses.
    num_samples: Examples that are read of each task.
    length: Tokens that an example has at most.
    budget: Share of the context's tokens that stay in the cache.
    answer_tokens: Tokens that an answer has at most.
    seed: Random seed that draws the examples.
  """

  tasks: tuple[str, ...] = ("niah_single_1", "niah_single_2")
  policies: tuple[str, ...] = tuple(policy_names.PRESSES)[:2]
  num_samples: int = 4
  length: int = 512
  budget: float = 0.5
  answer_tokens: int = 32
  seed: int = 0

  def __post_init__(self):
    for name in ("num_samples", "length", "answer_tokens"):
      require.at_least(name, getattr(self, name), 1)
    if not 0 < self.budget < 1:
      raise errors.UserError(
          f"budget={self.budget} must be between 0 and 1: a share that stays."
      )
    for name in self.policies:
      if name not in policy_names.PRESSES:
        raise errors.UserError(
            f"policies={name} has no equal press; there are"
            f" {', '.join(policy_names.PRESSES)}."
        )

  def evaluated(self) -> evaluate_config.EvaluateConfig:
    """The same as settings of `launch.evaluate_cache`."""
    return evaluate_config.EvaluateConfig(
        tasks=(evaluate_config.RULER,),
        policies=self.policies,
        protocol="agnostic",
        length=self.length,
        batch_size=self.num_samples,
        num_seeds=1,
        first_seed=self.seed,
        ruler=ruler_config.RulerConfig(
            names=self.tasks,
            budgets=(self.budget,),
            answer_tokens=self.answer_tokens,
        ),
    )


class Peer(NamedTuple):
  """transformers' model of the same folder."""

  model: Any
  eos_ids: tuple[int, ...]

  def answer(
      self, press: Any, text: written_lib.Written, num_kept: int, num_new: int
  ) -> list[int]:
    """Answers greedily after a compressed context.

    Args:
      press: Of kvpress.
      text: Ids.
      num_kept: Keys of the context that stay.
      num_new: Tokens of the answer at most.
    """
    import torch
    import transformers

    length = len(text.context)
    # Theirs is rounded down.
    press.compression_ratio = 1 - (num_kept + 0.5) / length
    cache, given = transformers.DynamicCache(), text.question
    row = lambda ids: torch.tensor(np.asarray(ids, np.int64))[None]
    said: list[int] = []
    with torch.no_grad():
      with press(self.model):
        self.model.model(row(text.context), past_key_values=cache)
      start = length
      while len(said) < num_new:
        found = self.model(
            row(given),
            past_key_values=cache,
            position_ids=row(np.arange(start, start + len(given))),
        )
        token, start = int(found.logits[0, -1].argmax()), start + len(given)
        if token in self.eos_ids:
          break
        said.append(token)
        given = np.array([token])
    return said


def measure(folder: str, config: BenchConfig) -> dict[str, Any]:
  """Returns rows of both.

  Args:
    folder: Of a model and its tokenizer.
    config: What to read.

  Raises:
    UserError: kvpress is not installed, or the folder cannot be read.
  """
  harness.require(("kvpress", "transformers"), "other scripts than this one")
  settings = config.evaluated()
  ruler_subject.check(settings, folder)
  reader = ruler_subject.load(settings, folder)
  cells = [
      ruler_grid.draw(settings, reader.writer, task, config.length)
      for task in config.tasks
  ]
  rows = []
  for row in _rows(config, reader, cells, _load(folder, reader.eos_ids)):
    harness.tell(f"{row['task']}, {row['policy']}", row)
    rows.append(row)
  return {"rows": rows}


def _rows(
    config: BenchConfig,
    reader: ruler_grid.Reader,
    cells: Sequence[ruler_grid.Cell],
    peer: Peer,
) -> Iterator[harness.Row]:
  settings = config.evaluated()
  for policy in config.policies:
    setting = ruler_grid.setting(
        settings,
        reader,
        ruler_grid.sizes_of(settings, cells),
        policy,
        config.budget,
    )
    for cell in cells:
      yield _row(settings, reader, cell, policy, setting, peer)


def _row(
    settings: evaluate_config.EvaluateConfig,
    reader: ruler_grid.Reader,
    cell: ruler_grid.Cell,
    policy: str,
    setting: reading.Setting,
    peer: Peer,
) -> harness.Row:
  (samples,), (texts,) = cell.samples, cell.texts
  num_new, subject = settings.ruler.num_new(cell.task), reader.subject
  ours = reading.answer(setting, subject.model, subject.params, texts, num_new)
  press = _press(policy)
  theirs = [
      peer.answer(press, text, reading.num_kept(setting, text), num_new)
      for text in texts
  ]
  assert subject.tokenizer is not None
  decode: Callable[..., str] = subject.tokenizer.decode
  score = lambda said: sum(
      scoring.score(decode(ids), x.answers, any_counts=x.any_counts)
      for ids, x in zip(said, samples, strict=True)
  )
  same = [list(a) == b for a, b in zip(ours, theirs, strict=True)]
  return {
      "task": cell.task,
      "policy": policy,
      "ours": score(ours),
      "kvpress": score(np.array(ids, np.int32) for ids in theirs),
      "same_answers": sum(same),
      "num_samples": len(texts),
  }


def _press(policy: str) -> Any:
  import kvpress

  name, fields = policy_names.PRESSES[policy]
  return getattr(kvpress, name)(**fields)


def _load(folder: str, eos_ids: tuple[int, ...]) -> Peer:
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, attn_implementation="eager"
  )
  return Peer(model.eval(), eos_ids)


if __name__ == "__main__":
  _MODEL = harness.define_model(
      "Hugging Face folder with a tokenizer, which reads.", is_required=True
  )
  harness.run(BenchConfig(), lambda config: measure(_MODEL.value, config))
