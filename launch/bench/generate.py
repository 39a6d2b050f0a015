"""Measures generation against transformers with its static cache, on a CPU.

  python -m launch.bench.generate --model=SmolLM2-135M --output=bench.json

Both continue the same prompts greedily in float32, with a cache of the same
fixed capacity, and take turns, round by round, in one process, each with all
cores. The median over rounds counts, and ratios are medians of ratios within a
round. `same_tokens` says whether both wrote the same text.

Other programs on the machine falsify the times.
"""

from collections.abc import Callable
import dataclasses
import importlib.util
import inspect
import json
import pathlib
import statistics
import time
from typing import Any

from absl import flags
import numpy as np

from launch import app
from launch import flag_config
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import workdir as workdir_lib

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

  @property
  def capacity(self) -> int:
    """Positions of the caches: one turn more than the rounds, to warm up."""
    return self.prompt_len + (self.num_rounds + 1) * self.num_steps + 1


# Whoever imports this module for its functions gets no flags.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_MODEL = flags.DEFINE_string(
    "model", None, "Folder of the model.", flag_values=_FLAGS, required=True
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "JSON file to write.", flag_values=_FLAGS
)
_CONFIG = flag_config.define(BenchConfig(), flag_values=_FLAGS)


@dataclasses.dataclass
class Row:
  """One who continues the prompts.

  Attributes:
    name: In the table.
    prefill_s: Seconds that reading the prompts takes, compiled before.
    turn: Takes the steps of a turn and returns the tokens, [steps, B].
    seconds: Of each turn.
    tokens: Of all turns.
  """

  name: str
  prefill_s: float
  turn: Callable[[], np.ndarray]
  seconds: list[float] = dataclasses.field(default_factory=list)
  tokens: list[np.ndarray] = dataclasses.field(default_factory=list)

  def take(self) -> None:
    """Takes a turn."""
    started = time.perf_counter()
    self.tokens.append(self.turn())
    self.seconds.append(time.perf_counter() - started)


def main(_: list[str]) -> None:
  """Measures, prints, writes."""
  from scansnap_jax.experiment import devices

  output = _OUTPUT.value
  if output and not pathlib.Path(output).absolute().parent.is_dir():
    raise errors.UserError(f"--output={output} is in no folder that exists")
  devices.set_up(num_cpu_devices=1)
  results = measure(_MODEL.value, _CONFIG())
  if output:
    workdir_lib.write_atomic(output, json.dumps(results, indent=2) + "\n")


def measure(folder: str, config: BenchConfig) -> dict[str, Any]:
  """Makes and prints the measurements of each batch size.

  Raises:
    UserError: If transformers is to be measured and is not installed.
  """
  for name in ("torch", "transformers") if config.peer else ():
    if importlib.util.find_spec(name) is None:
      raise errors.UserError(
          f"{name} is not installed: pip install -e '.[bench]', or --nopeer"
      )
  batches = [
      _measure_batch(folder, batch_size, config)
      for batch_size in config.batch_sizes
  ]
  return {"batches": batches}


def _measure_batch(
    folder: str, batch_size: int, config: BenchConfig
) -> dict[str, Any]:
  """Takes turns; the first one compiles and warms up."""
  rows = [start(folder, batch_size, config) for start in _starts(config)]
  for _ in range(config.num_rounds + 1):
    for row in rows:
      time.sleep(_PAUSE_S)
      row.take()
  result = {"batch_size": batch_size, "rows": [], "same_tokens": _same(rows)}
  for row in rows:
    seconds = row.seconds[1:]
    ratios = [a / b for a, b in zip(seconds, rows[0].seconds[1:], strict=True)]
    result["rows"].append({
        "name": row.name,
        "tokens_per_sec": (
            batch_size * config.num_steps / statistics.median(seconds)
        ),
        "ms_per_step": 1e3 * statistics.median(seconds) / config.num_steps,
        "prefill_ms": 1e3 * row.prefill_s,
        "times_ours": statistics.median(ratios),
    })
  _print(result)
  return result


def _starts(config: BenchConfig) -> list[Callable[..., Row]]:
  return [start_ours, start_transformers] if config.peer else [start_ours]


def _prompts(
    vocab_size: int, batch_size: int, config: BenchConfig
) -> np.ndarray:
  shape = (batch_size, config.prompt_len)
  return np.random.default_rng(config.seed).integers(0, vocab_size, shape)


def start_ours(folder: str, batch_size: int, config: BenchConfig) -> Row:
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

  def prefill():
    kv_cache = full_cache.init(shape, batch_size, config.capacity)
    return jax.block_until_ready(
        generate.prefill(model, params, prompts, lengths, kv_cache)
    )

  state, prefill_s = prefill(), _seconds_of(prefill)

  def turn() -> np.ndarray:
    nonlocal state
    tokens = []
    for _ in range(config.num_steps):
      tokens.append(np.asarray(state.tokens))
      state = generate.decode_step(model, params, state)
    jax.block_until_ready(state)
    return np.stack(tokens)

  return Row("ours", prefill_s, turn)


def start_transformers(
    folder: str, batch_size: int, config: BenchConfig
) -> Row:
  """Reads the prompts with transformers, without gradients."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32
  ).eval()
  # transformers 5.24 renamed the argument.
  known = inspect.signature(model.forward).parameters
  cache_name = "cache" if "cache" in known else "past_key_values"
  vocab_size = model.config.vocab_size
  prompts = torch.tensor(_prompts(vocab_size, batch_size, config))

  @torch.inference_mode()
  def prefill():
    cache = transformers.StaticCache(
        config=model.config, max_cache_len=config.capacity
    )
    return cache, step(prompts, cache)

  def step(tokens, cache):
    options = {cache_name: cache, "logits_to_keep": 1}
    return model(tokens, **options).logits[:, -1:].argmax(dim=-1)

  (cache, tokens), prefill_s = prefill(), _seconds_of(prefill)

  @torch.inference_mode()
  def turn() -> np.ndarray:
    nonlocal tokens
    kept = []
    for _ in range(config.num_steps):
      kept.append(tokens[:, 0].numpy())
      tokens = step(tokens, cache)
    return np.stack(kept)

  return Row("transformers", prefill_s, turn)


def _seconds_of(call: Callable[[], Any]) -> float:
  started = time.perf_counter()
  call()
  return time.perf_counter() - started


def _same(rows: list[Row]) -> bool:
  texts = [np.concatenate(row.tokens) for row in rows]
  return all(np.array_equal(text, texts[0]) for text in texts)


def _print(result: dict[str, Any]) -> None:
  print(
      f"batch {result['batch_size']}, the same tokens: {result['same_tokens']}"
  )
  for row in result["rows"]:
    print(
        f"  {row['name']:14} {row['tokens_per_sec']:8.1f} tokens/s"
        f" {row['ms_per_step']:8.2f} ms a step"
        f" {row['prefill_ms']:8.1f} ms prefill"
        f"  time {row['times_ours']:.2f} of ours"
    )


if __name__ == "__main__":
  app.run(main)
