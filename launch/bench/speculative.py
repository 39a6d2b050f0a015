"""Measures what guesses of n-grams save at decode, on this machine.

  python -m launch.bench.speculative --model=SmolLM2-135M --output=bench.json

A prompt asks the model to say a text again, and another to go on with a story:
of the one n-grams know what comes, of the other little. Both are continued one
token a pass, and with each of `ks` guesses a pass. In turns, see
`launch.bench.harness`; all write the same tokens, or the run says that they do
not. The guesses of a pass that finds none are left out.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np

from launch.bench import harness
from scansnap_jax.experiment import require

_PAUSE_S = 0.2
_TEXT = (
    "The mill stood at the bend of the river, where the water was slow and"
    " brown in summer. Its owner, a widow called Marta, ground the wheat of"
    " four villages and took a tenth of the flour as her share. On Sundays the"
    " wheel was stopped, and children walked along its rim."
)
# The model's chat template, which SmolLM2's instruct models have.
_ASKED = "<|im_start|>user\n{} {}<|im_end|>\n<|im_start|>assistant\n"
_PROMPTS = {
    "say again": _ASKED.format("Repeat this text word by word:", _TEXT),
    "go on": _ASKED.format("Write a story that begins like this:", _TEXT),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """What to measure, and its sizes.

  Attributes:
    ks: Guesses of a pass.
    policy: What leaves the KV cache: full, h2o, ...
    capacity: Slots of a policy that evicts.
    num_new: Tokens of each continuation.
    num_rounds: Rounds, of which the median counts.
  """

  ks: tuple[int, ...] = (4,)
  policy: str = "full"
  capacity: int = 128
  num_new: int = 64
  num_rounds: int = 3

  def __post_init__(self):
    for name in ("capacity", "num_rounds"):
      require.at_least(name, getattr(self, name), 1)
    require.at_least("num_new", self.num_new, 2)
    for k in self.ks:
      require.at_least("ks", k, 1)


def measure(folder: str, config: BenchConfig) -> harness.Row:
  """Makes and prints the measurements of each prompt."""
  from joma.transformer import model as models
  from joma.transformer.hf import pretrained
  from joma.transformer.text import tokenizer as tokenizers

  tokenizer = tokenizers.from_folder(folder)
  shape, params = pretrained.load(folder)
  model = models.Transformer(shape)
  result: harness.Row = {"config": dataclasses.asdict(config), "prompts": []}
  for name, text in _PROMPTS.items():
    prompt = tokenizer.encode(text, special=False).tolist()
    found = _measure_prompt(_Subject(model, params, prompt), config)
    result["prompts"].append({"prompt": name, **found})
    harness.tell(name, found)
  return result


class _Subject:
  """A prompt and its model, which `turns` continue."""

  def __init__(self, model: Any, params: Any, prompt: list[int]):
    self._arguments = (model, params, [prompt])
    self.rounds: Any = None
    self.tokens: list[int] = []

  def turn(self, config: BenchConfig, k: int | None) -> Callable[[], None]:
    """Returns what continues the prompt; None is without guesses."""
    from joma.inference import generate
    from joma.inference.cache import kv_cache
    from joma.inference.speculative import draft_config
    from joma.inference.speculative import drafts
    from joma.inference.speculative import streaming
    from joma.systems.cache_policies import names

    model, policy = self._arguments[0], names.parse(config.policy)
    options: dict[str, Any] = {"max_new_tokens": config.num_new}

    def turn() -> None:
      if policy.evicts:
        options["kv_cache"] = kv_cache.init(
            policy, model.config, 1, config.capacity
        )
      if k is None:
        steps = generate.stream(*self._arguments, **options)
      else:
        draft = drafts.of(draft_config.NGram(k=k))
        steps = streaming.stream(*self._arguments, draft, **options)
        self.rounds = steps
      self.tokens = [int(tokens[0]) for tokens, _ in steps]

    return turn


def _measure_prompt(subject: _Subject, config: BenchConfig) -> harness.Row:
  """Takes turns; the first one compiles and warms up."""
  kinds = (None, *config.ks)
  turns = {str(k): subject.turn(config, k) for k in kinds}
  tokens, gains = {}, {}
  for k, turn in turns.items():
    turn()
    tokens[k] = subject.tokens
    if subject.rounds is not None:
      gains[k] = subject.rounds.num_yielded / subject.rounds.num_passes
  seconds = harness.take_turns(
      turns, config.num_rounds, num_warm_ups=0, pause_s=_PAUSE_S
  )
  first = str(None)
  return {
      "rows": [
          {
              "guesses": k,
              "tokens_per_sec": config.num_new / float(np.median(times)),
              "tokens_per_pass": gains.get(k, 1.0),
              "times_faster": 1 / harness.ratio(times, seconds[first]),
              "same_tokens": tokens[k] == tokens[first],
          }
          for k, times in seconds.items()
      ]
  }


if __name__ == "__main__":
  _MODEL = harness.define_model(
      "Folder of the model, or its name on Hugging Face.", is_required=True
  )
  harness.run(BenchConfig(), lambda config: measure(_MODEL.value, config))
