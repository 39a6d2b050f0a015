"""Measures what eviction buys at decode, beside kvpress, on this machine.

  python -m launch.bench.inference --output=bench.json

Decodes after `length` tokens: with the full cache and with `capacity` slots of
H2O's policy; with transformers' full cache, and with kvpress, which cuts its
cache back to the same number of keys every `peer_interval` steps. Same weights,
float32, one process, in turns; medians over rounds, ratios within a round. The
caches are filled with noise, whose values no time depends on. The attention
part is that of all layers, one after the other, in a program of its own. The
cost model's ratio stands beside, with this machine's bandwidth measured in the
same run.

Other programs on the machine falsify the times. kvpress wants a transformers of
its own: without it, or with --nopeer, only our rows are there.
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib.util
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

from absl import flags

from launch import app
from launch import flag_config
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require
from scansnap_jax.experiment import workdir as workdir_lib

_PAUSE_S = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """What to measure, and its sizes.

  Attributes:
    peer: Measure transformers and kvpress too.
    batch_sizes: Sequences that are continued together.
    length: Tokens before the first step.
    capacity: Slots of the small cache.
    peer_interval: Steps between two of kvpress's cuts.
    num_layers: Layers of the model that stands in for --model.
    num_rounds: Rounds, of which the median counts.
    num_steps: Decode steps in a turn.
    seed: Random seed for weights and noise.
  """

  peer: bool = True
  batch_sizes: tuple[int, ...] = (1, 8)
  length: int = 8192
  capacity: int = 1024
  peer_interval: int = 32
  num_layers: int = 30
  num_rounds: int = 5
  num_steps: int = 8
  seed: int = 0

  def __post_init__(self):
    for name in ("length", "peer_interval", "num_layers", "num_rounds"):
      require.at_least(name, getattr(self, name), 1)
    require.at_least("num_steps", self.num_steps, 1)
    if not 4 <= self.capacity <= self.length:
      raise errors.UserError(
          f"capacity={self.capacity} must be from 4 to length={self.length}."
      )


# Whoever imports this module for its functions gets no flags.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Hugging Face folder; none is random weights of SmolLM2-135M's sizes.",
    flag_values=_FLAGS,
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "JSON file to write.", flag_values=_FLAGS
)
_CONFIG = flag_config.define(BenchConfig(), flag_values=_FLAGS)


@dataclasses.dataclass
class Row:
  """One way to decode.

  Attributes:
    name: In the table.
    turn: Takes the steps of a turn.
    cache_bytes: Of all layers and sequences.
    seconds: Of each turn.
  """

  name: str
  turn: Callable[[], Any]
  cache_bytes: int
  seconds: list[float] = dataclasses.field(default_factory=list)

  def take(self) -> None:
    """Takes a turn."""
    time.sleep(_PAUSE_S)
    started = time.perf_counter()
    self.turn()
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


def measure(folder: str | None, config: BenchConfig) -> dict[str, Any]:
  """Makes and prints the measurements of each batch size."""
  with tempfile.TemporaryDirectory() as own:
    if folder is None:
      folder = own
      _save_random_model(folder, config)
    gb_per_sec = _bandwidth()
    print(f"bandwidth of reading: {gb_per_sec:.1f} GB/s")
    batches = [
        _measure_batch(folder, batch_size, gb_per_sec, config)
        for batch_size in config.batch_sizes
    ]
  return {
      "config": dataclasses.asdict(config),
      "gb_per_sec": gb_per_sec,
      "batches": batches,
  }


def _measure_batch(
    folder: str, batch_size: int, gb_per_sec: float, config: BenchConfig
) -> dict[str, Any]:
  """Takes turns; the first one compiles and warms up."""
  from joma.transformer.hf import pretrained

  shape, params = pretrained.load(folder)
  shape = dataclasses.replace(
      shape, max_len=max(shape.max_len, config.length + 1)
  )
  attention = _in_turns(
      [
          start_attention(name, shape, batch_size, config)
          for name in ("full", "h2o")
      ],
      config,
  )
  starts = [
      functools.partial(start_ours, name, shape, params)
      for name in ("full", "h2o")
  ]
  if config.peer and importlib.util.find_spec("kvpress"):
    starts += [
        functools.partial(start_peer, name, folder)
        for name in ("transformers", "kvpress")
    ]
  decode = _in_turns([start(batch_size, config) for start in starts], config)
  predicted = _predicted(shape, batch_size, gb_per_sec, config)
  measured = decode[0]["ms_per_step"] / decode[1]["ms_per_step"]
  result = {
      "batch_size": batch_size,
      "attention": attention,
      "decode": decode,
      "ratio": measured,
      "ratio_of_cost_model": predicted,
  }
  _print(result)
  return result


def _in_turns(rows: list[Row], config: BenchConfig) -> list[dict[str, Any]]:
  for _ in range(config.num_rounds + 1):
    for row in rows:
      row.take()
  ours = rows[1].seconds[1:]
  return [
      {
          "name": row.name,
          "ms_per_step": (
              1e3 * statistics.median(row.seconds[1:]) / config.num_steps
          ),
          "times_h2o": statistics.median(
              a / b for a, b in zip(row.seconds[1:], ours, strict=True)
          ),
          "cache_bytes": row.cache_bytes,
      }
      for row in rows
  ]


def _caches(name: str, shape: Any, batch_size: int, config: BenchConfig) -> Any:
  """Caches that hold noise, a token in every slot but those to be written."""
  import jax
  import jax.numpy as jnp

  from joma.inference.cache import kv_cache
  from joma.systems.cache_policies.by_attention import h2o
  from joma.transformer import full_cache

  noise = lambda x: jax.random.normal(jax.random.key(config.seed), x.shape)
  num_steps = (config.num_rounds + 1) * config.num_steps
  if name == "full":
    caches = full_cache.init(shape, batch_size, config.length + num_steps)
    return jax.tree.map(noise, caches)
  policy = h2o.H2O(num_sinks=4)
  caches = kv_cache.init(policy, shape, batch_size, config.capacity)
  first = config.length - config.capacity
  return tuple(
      dataclasses.replace(
          cache,
          key=jax.tree.map(noise, cache.key),
          value=jax.tree.map(noise, cache.value),
          score=jnp.abs(noise(cache.score)),
          pos=jnp.zeros_like(cache.pos)
          + first
          + jnp.arange(cache.capacity)[None, None],
      )
      for cache in caches
  )


def start_attention(
    name: str, shape: Any, batch_size: int, config: BenchConfig
) -> Row:
  """The attention of all layers on projected vectors, the caches donated."""
  import jax
  import jax.numpy as jnp

  from joma.transformer import attention

  options = attention.AttentionOptions(scale=shape.head_dim**-0.5)
  draw = lambda heads: jax.random.normal(
      jax.random.key(config.seed), (batch_size, 1, heads, shape.head_dim)
  )
  query, key = draw(shape.num_heads), draw(shape.num_kv_heads)
  caches = _caches(name, shape, batch_size, config)
  plain = lambda x, positions: x

  @functools.partial(jax.jit, donate_argnums=0)
  def step(caches, position):
    positions = jnp.full((batch_size, 1), position)
    # Each layer's query is what the one before it gave, as in a model.
    out, new = query, []
    for cache in caches:
      out, cache = cache.attend(out, key, key, positions, plain, options)
      new.append(cache)
    return tuple(new), out

  position = config.length

  def turn():
    nonlocal caches, position
    for _ in range(config.num_steps):
      caches, _ = step(caches, position)
      position += 1
    jax.block_until_ready(caches)

  return Row(name, turn, _nbytes(caches))


def start_ours(
    name: str,
    shape: Any,
    params: Any,
    batch_size: int,
    config: BenchConfig,
) -> Row:
  """The whole model's step, `generate.decode_step`."""
  import jax
  import jax.numpy as jnp

  from joma.inference import generate
  from joma.transformer import model as models

  model = models.Transformer(shape)
  state = generate.state_of(
      jnp.zeros(batch_size, jnp.int32),
      jnp.full(batch_size, config.length, jnp.int32),
      _caches(name, shape, batch_size, config),
  )
  cache_bytes = _nbytes(state.kv_cache)

  def turn():
    nonlocal state
    for _ in range(config.num_steps):
      state = generate.decode_step(model, params, state)
    jax.block_until_ready(state.tokens)

  return Row(name, turn, cache_bytes)


def start_peer(
    name: str, folder: str, batch_size: int, config: BenchConfig
) -> Row:
  """Hugging Face's model with all keys, or those that kvpress leaves."""
  import contextlib

  import kvpress
  import torch
  import transformers

  transformers.utils.logging.disable_progress_bar()
  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32
  ).eval()
  is_cut = name == "kvpress"
  length = config.capacity if is_cut else config.length
  sizes = model.config
  cache = transformers.DynamicCache(config=sizes)
  noise = torch.randn(
      batch_size,
      sizes.num_key_value_heads,
      length,
      sizes.hidden_size // sizes.num_attention_heads,
  )
  for layer in range(sizes.num_hidden_layers):
    cache.update(noise.clone(), noise.clone(), layer)
  press = kvpress.DecodingPress(
      base_press=kvpress.KnormPress(),
      compression_interval=config.peer_interval,
      target_size=config.capacity,
  )
  tokens = torch.zeros(batch_size, 1, dtype=torch.long)
  position = config.length

  @torch.inference_mode()
  def turn():
    nonlocal tokens, position
    with press(model) if is_cut else contextlib.nullcontext():
      for _ in range(config.num_steps):
        at = torch.full((batch_size, 1), position)
        tokens = (
            model(
                tokens,
                past_key_values=cache,
                position_ids=at,
                cache_position=torch.tensor([position]),
                use_cache=True,
            )
            .logits[:, -1:]
            .argmax(dim=-1)
        )
        position += 1

  # Between two cuts it grows by as many keys.
  keys = length + (config.peer_interval if is_cut else 0)
  heads = sizes.num_hidden_layers * batch_size * sizes.num_key_value_heads
  return Row(name, turn, 2 * 4 * heads * keys * noise.shape[-1])


def _save_random_model(folder: str, config: BenchConfig) -> None:
  """SmolLM2-135M's sizes, for whoever has no weights at hand."""
  import jax
  import jax.numpy as jnp

  from joma.transformer import config as configs
  from joma.transformer import model as models
  from joma.transformer.hf import pretrained

  shape = configs.TransformerConfig(
      vocab_size=49152,
      num_layers=config.num_layers,
      embed_dim=576,
      num_heads=9,
      num_kv_heads=3,
      head_dim=64,
      hidden_dim=1536,
      max_len=8192,
  )
  tokens = jnp.zeros((1, 2), jnp.int32)
  init = jax.jit(models.Transformer(shape).init)
  params = init(jax.random.key(config.seed), tokens)["params"]
  pretrained.save(folder, shape, params)


def _predicted(shape, batch_size, gb_per_sec, config) -> float:
  """Time of the full cache's step over the small one's, by the cost model."""
  from joma.inference.cost import cache_plan
  from joma.inference.cost import chips
  from joma.inference.cost import cost_model

  load = cost_model.Load(
      batch_size=batch_size,
      length=config.length,
      weight_dtype="float32",
      cache_dtype="float32",
  )
  machine = chips.measured(gb_per_sec, _tflops())
  seconds = [
      cost_model.decode(shape, load, plan, counts_lookup=False).seconds(machine)
      for plan in (cache_plan.full(), cache_plan.scored(config.capacity))
  ]
  return seconds[0] / seconds[1]


def _bandwidth() -> float:
  """Bytes read of an array that no cache holds, GB/s: the best of ten sums."""
  import jax
  import jax.numpy as jnp

  array = jnp.ones(2**27, jnp.float32)
  total = jax.jit(jnp.sum)
  return array.nbytes / _best_seconds(lambda: total(array)) / 1e9


def _tflops() -> float:
  import jax
  import jax.numpy as jnp

  side = 2048
  matrix = jnp.ones((side, side))
  multiply = jax.jit(jnp.dot)
  seconds = _best_seconds(lambda: multiply(matrix, matrix))
  return 2 * side**3 / seconds / 1e12


def _best_seconds(call: Callable[[], Any]) -> float:
  found = []
  for _ in range(11):
    started = time.perf_counter()
    call().block_until_ready()
    found.append(time.perf_counter() - started)
  return min(found[1:])


def _nbytes(tree: Any) -> int:
  import jax

  return sum(x.nbytes for x in jax.tree.leaves(tree))


def _print(result: dict[str, Any]) -> None:
  print(f"batch {result['batch_size']}")
  for part in ("attention", "decode"):
    for row in result[part]:
      print(
          f"  {part:10} {row['name']:13} {row['ms_per_step']:9.2f} ms a step"
          f"  {row['times_h2o']:6.2f} of h2o's"
          f"  cache {row['cache_bytes'] / 2**20:8.1f} MiB"
      )
  print(
      f"  full over h2o: {result['ratio']:.2f} measured,"
      f" {result['ratio_of_cost_model']:.2f} by the cost model"
  )


if __name__ == "__main__":
  app.run(main)
