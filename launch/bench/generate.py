"""Measures generation against transformers with its static cache, on a CPU.

  python -m launch.bench.generate --model=SmolLM2-135M --output=bench.json

Both continue the same prompts greedily in float32, with a cache of the same
fixed capacity, and take turns, see `launch.bench.harness`; each has all cores.
`same_tokens` says whether both wrote the same text.
"""

from collections.abc import Callable
import dataclasses
import inspect

import numpy as np

from launch.bench import harness
from scansnap_jax.experiment import require

_PAUSE_S = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """What to measure, and its sizes.

  Attributes:
    peer: Measure transformers too.
    batch_sizes: Sequences that are continued together.
    prompt_len: Tokens of each prompt.
    num_rounds: Rounds, of which the median counts.
    num_steps: Tokens of each sequence in a turn.
    seed: Random seed for the prompts, which are random tokens.
  """

  peer: bool = True
  batch_sizes: tuple[int, ...] = (1, 8)
  prompt_len: int = 64
  num_rounds: int = 5
  num_steps: int = 32
  seed: int = 0

  def __post_init__(self):
    for name in ("prompt_len", "num_rounds", "num_steps"):
      require.at_least(name, getattr(self, name), 1)
    require.seeds("seed", self.seed)
    require.memory(
        f"a cache of prompt_len + (num_rounds + 1) num_steps={self.capacity}",
        4 * self.capacity,
    )

  @property
  def capacity(self) -> int:
    """Positions of the caches: one turn more than the rounds, to warm up."""
    return self.prompt_len + (self.num_rounds + 1) * self.num_steps + 1


@dataclasses.dataclass
class Writer:
  """One who continues the prompts.

  Attributes:
    prefill_s: Seconds that reading the prompts takes, compiled before.
    steps: Takes the steps of a turn and returns the tokens, [steps, B].
    tokens: Of all turns.
  """

  prefill_s: float
  steps: Callable[[], np.ndarray]
  tokens: list[np.ndarray] = dataclasses.field(default_factory=list)

  def turn(self) -> None:
    """Takes a turn."""
    self.tokens.append(self.steps())


def measure(folder: str, config: BenchConfig) -> harness.Row:
  """Makes and prints the measurements of each batch size.

  Raises:
    UserError: If transformers is to be measured and is not installed.
  """
  harness.require(("torch", "transformers") if config.peer else (), "--nopeer")
  batches = [
      _measure_batch(folder, batch_size, config)
      for batch_size in config.batch_sizes
  ]
  return {"batches": batches}


def _measure_batch(
    folder: str, batch_size: int, config: BenchConfig
) -> harness.Row:
  """Takes turns; the first one compiles and warms up."""
  writers = {"ours": start_ours(folder, batch_size, config)}
  if config.peer:
    writers["transformers"] = start_transformers(folder, batch_size, config)
  seconds = harness.take_turns(
      {name: writer.turn for name, writer in writers.items()},
      config.num_rounds,
      num_steps=config.num_steps,
      pause_s=_PAUSE_S,
  )
  texts = [np.concatenate(writer.tokens) for writer in writers.values()]
  result = {
      "batch_size": batch_size,
      "rows": [
          {
              "name": name,
              "tokens_per_sec": batch_size / float(np.median(seconds[name])),
              "ms_per_step": 1e3 * float(np.median(seconds[name])),
              "prefill_ms": 1e3 * writer.prefill_s,
              "times_ours": harness.ratio(seconds[name], seconds["ours"]),
          }
          for name, writer in writers.items()
      ],
      "same_tokens": all(np.array_equal(text, texts[0]) for text in texts),
  }
  harness.tell(f"batch {batch_size}", result)
  return result


def _prompts(
    vocab_size: int, batch_size: int, config: BenchConfig
) -> np.ndarray:
  shape = (batch_size, config.prompt_len)
  return np.random.default_rng(config.seed).integers(0, vocab_size, shape)


def start_ours(folder: str, batch_size: int, config: BenchConfig) -> Writer:
  """Reads the prompts with `joma.inference.generate`."""
  import jax

  from joma.inference import generate
  from joma.transformer import full_cache
  from joma.transformer import model as models
  from joma.transformer.hf import pretrained

  shape, params = pretrained.load(folder)
  model = models.Transformer(shape)
  prompts = _prompts(shape.vocab_size, batch_size, config).astype(np.int32)
  lengths = np.full(batch_size, config.prompt_len, np.int32)

  def prefill() -> generate.DecodeState:
    kv_cache = full_cache.init(shape, batch_size, config.capacity)
    return jax.block_until_ready(
        generate.prefill(model, params, prompts, lengths, kv_cache)
    )

  state = prefill()
  prefill_s = float(harness.seconds_of(prefill, 1)[0])

  def steps() -> np.ndarray:
    nonlocal state
    tokens = []
    for _ in range(config.num_steps):
      tokens.append(np.asarray(state.tokens))
      state = generate.decode_step(model, params, state)
    jax.block_until_ready(state)
    return np.stack(tokens)

  return Writer(prefill_s, steps)


def start_transformers(
    folder: str, batch_size: int, config: BenchConfig
) -> Writer:
  """Reads the prompts with transformers, without gradients."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32
  ).eval()
  # transformers 5.24 renamed the argument.
  known = inspect.signature(model.forward).parameters
  cache_name = "cache" if "cache" in known else "past_key_values"
  prompts = torch.tensor(_prompts(model.config.vocab_size, batch_size, config))

  def step(
      tokens: torch.Tensor, cache: transformers.StaticCache
  ) -> torch.Tensor:
    options = {cache_name: cache, "logits_to_keep": 1}
    return model(tokens, **options).logits[:, -1:].argmax(dim=-1)

  @torch.inference_mode()
  def prefill() -> tuple[transformers.StaticCache, torch.Tensor]:
    cache = transformers.StaticCache(
        config=model.config, max_cache_len=config.capacity
    )
    return cache, step(prompts, cache)

  cache, tokens = prefill()
  prefill_s = float(harness.seconds_of(prefill, 1)[0])

  @torch.inference_mode()
  def steps() -> np.ndarray:
    nonlocal tokens
    kept = []
    for _ in range(config.num_steps):
      kept.append(tokens[:, 0].numpy())
      tokens = step(tokens, cache)
    return np.stack(kept)

  return Writer(prefill_s, steps)


if __name__ == "__main__":
  _MODEL = harness.define_model(
      "Folder of the model, or its name on Hugging Face.", is_required=True
  )
  harness.run(BenchConfig(), lambda config: measure(_MODEL.value, config))
