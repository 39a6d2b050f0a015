"""Measures what eviction buys at decode, beside kvpress, on this machine.

  python -m launch.bench.inference --output=bench.json

Decodes after `length` tokens: with the full cache and with `capacity` slots of
H2O's policy; with transformers' full cache, and with kvpress, which cuts its
cache back to the same number of keys every `peer_interval` steps. Same weights,
float32, in turns, see `launch.bench.harness`. The caches are filled with noise,
whose values no time depends on. The attention part is that of all layers, one
after the other, in a program of its own. The cost model's ratio stands beside,
with this machine's bandwidth measured in the same run.

kvpress wants a transformers of its own: without it, or with --nopeer, only our
rows are there.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import importlib.util
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from joma.systems.cache_policies import names
from joma.transformer import config as configs
from launch.bench import harness
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

_PAUSE_S = 0.2
# All keys, and the policy that keeps some.
_OURS = (names.REFERENCE, names.COMPARED[0])


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


class Decoder(NamedTuple):
  """One way to decode.

  Attributes:
    turn: Takes the steps of a turn.
    cache_bytes: Of all layers and sequences.
  """

  turn: Callable[[], None]
  cache_bytes: int


def measure(folder: str | None, config: BenchConfig) -> harness.Row:
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
) -> harness.Row:
  """Takes turns; the first one compiles and warms up."""
  from joma.transformer.hf import pretrained

  shape, params = pretrained.load(folder)
  shape = dataclasses.replace(
      shape, max_len=max(shape.max_len, config.length + 1)
  )
  attention = {
      name: start_attention(name, shape, batch_size, config) for name in _OURS
  }
  rows = {"attention": _in_turns(attention, config)}
  decode = {
      name: start_ours(name, shape, params, batch_size, config)
      for name in _OURS
  }
  if config.peer and importlib.util.find_spec("kvpress"):
    decode |= {
        name: start_peer(name, folder, batch_size, config)
        for name in ("transformers", "kvpress")
    }
  rows["decode"] = _in_turns(decode, config)
  full, small = (row["ms_per_step"] for row in rows["decode"][:2])
  result = {
      "batch_size": batch_size,
      **rows,
      "ratio": full / small,
      "ratio_of_cost_model": _predicted(shape, batch_size, gb_per_sec, config),
  }
  harness.tell(f"batch {batch_size}", result)
  return result


def _in_turns(
    decoders: Mapping[str, Decoder], config: BenchConfig
) -> list[harness.Row]:
  seconds = harness.take_turns(
      {name: decoder.turn for name, decoder in decoders.items()},
      config.num_rounds,
      num_steps=config.num_steps,
      pause_s=_PAUSE_S,
  )
  small = seconds[_OURS[1]]
  return [
      {
          "name": name,
          "ms_per_step": 1e3 * float(np.median(seconds[name])),
          f"times_{_OURS[1]}": harness.ratio(seconds[name], small),
          "cache_bytes": decoder.cache_bytes,
      }
      for name, decoder in decoders.items()
  ]


def _caches(
    name: str,
    shape: configs.TransformerConfig,
    batch_size: int,
    config: BenchConfig,
) -> PyTree:
  """Caches that hold noise, a token in every slot but those to be written."""
  from joma.inference.cache import kv_cache
  from joma.transformer import full_cache

  noise = lambda x: jax.random.normal(jax.random.key(config.seed), x.shape)
  num_steps = (config.num_rounds + 1) * config.num_steps
  if name == names.REFERENCE:
    caches = full_cache.init(shape, batch_size, config.length + num_steps)
    return jax.tree.map(noise, caches)
  policy = names.from_name(name, num_sinks=4)
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
    name: str,
    shape: configs.TransformerConfig,
    batch_size: int,
    config: BenchConfig,
) -> Decoder:
  """The attention of all layers on projected vectors, the caches donated."""
  from joma.transformer import hooks

  options = hooks.AttentionOptions(scale=shape.head_dim**-0.5)
  draw = lambda heads: jax.random.normal(
      jax.random.key(config.seed), (batch_size, 1, heads, shape.head_dim)
  )
  query, key = draw(shape.num_heads), draw(shape.num_kv_heads)
  caches = _caches(name, shape, batch_size, config)
  plain = lambda x, positions: x  # No rotation.

  @functools.partial(jax.jit, donate_argnums=0)
  def step(
      caches: PyTree, position: Int[Array, ""]
  ) -> tuple[PyTree, Float[Array, "B 1 N H"]]:
    positions = jnp.full((batch_size, 1), position)
    # Each layer's query is what the one before it gave, as in a model.
    out, new = query, []
    for cache in caches:
      out, cache = cache.attend(out, key, key, positions, plain, options)
      new.append(cache)
    return tuple(new), out

  position = config.length

  def turn() -> None:
    nonlocal caches, position
    for _ in range(config.num_steps):
      caches, _ = step(caches, position)
      position += 1
    jax.block_until_ready(caches)

  return Decoder(turn, _nbytes(caches))


def start_ours(
    name: str,
    shape: configs.TransformerConfig,
    params: PyTree,
    batch_size: int,
    config: BenchConfig,
) -> Decoder:
  """The whole model's step, `generate.decode_step`."""
  from joma.inference import generate
  from joma.transformer import model as models

  model = models.Transformer(shape)
  state = generate.state_of(
      jnp.zeros(batch_size, jnp.int32),
      jnp.full(batch_size, config.length, jnp.int32),
      _caches(name, shape, batch_size, config),
  )
  cache_bytes = _nbytes(state.kv_cache)

  def turn() -> None:
    nonlocal state
    for _ in range(config.num_steps):
      state = generate.decode_step(model, params, state)
    jax.block_until_ready(state.tokens)

  return Decoder(turn, cache_bytes)


def start_peer(
    name: str, folder: str, batch_size: int, config: BenchConfig
) -> Decoder:
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
  head_dim = sizes.hidden_size // sizes.num_attention_heads
  shape = (batch_size, sizes.num_key_value_heads, length, head_dim)
  cache, noise = transformers.DynamicCache(config=sizes), torch.randn(shape)
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
  def turn() -> None:
    nonlocal tokens, position
    with press(model) if is_cut else contextlib.nullcontext():
      for _ in range(config.num_steps):
        logits = model(
            tokens,
            past_key_values=cache,
            position_ids=torch.full((batch_size, 1), position),
            cache_position=torch.tensor([position]),
            use_cache=True,
        ).logits
        tokens = logits[:, -1:].argmax(dim=-1)
        position += 1

  # Between two cuts it grows by as many keys; keys and values, float32.
  grown = (length + (config.peer_interval if is_cut else 0)) / length
  num_floats = 2 * sizes.num_hidden_layers * noise.numel()
  return Decoder(turn, round(4 * num_floats * grown))


def _save_random_model(folder: str, config: BenchConfig) -> None:
  """SmolLM2-135M's sizes, for whoever has no weights at hand."""
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


def _predicted(
    shape: configs.TransformerConfig,
    batch_size: int,
    gb_per_sec: float,
    config: BenchConfig,
) -> float:
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
  array = jnp.ones(2**27, jnp.float32)
  total = jax.jit(jnp.sum)
  return array.nbytes / _best_seconds(lambda: total(array)) / 1e9


def _tflops() -> float:
  side = 2048
  matrix = jnp.ones((side, side))
  multiply = jax.jit(jnp.dot)
  seconds = _best_seconds(lambda: multiply(matrix, matrix))
  return 2 * side**3 / seconds / 1e12


def _best_seconds(call: Callable[[], jax.Array]) -> float:
  times = harness.seconds_of(lambda: call().block_until_ready(), 11)
  return float(times[1:].min())


def _nbytes(tree: PyTree) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(tree))


if __name__ == "__main__":
  _MODEL = harness.define_model(
      "Hugging Face folder; none is random weights of SmolLM2-135M's sizes."
  )
  harness.run(BenchConfig(), lambda config: measure(_MODEL.value, config))
