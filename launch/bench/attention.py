"""Times every attention system beside softmax: a training step, a decode step.

  python -m launch.bench.attention --output=attention.json

A model of one layer takes training steps (loss, gradients, AdamW) on texts of
--train_length tokens, and decode steps with --decode_length - 1 tokens in its
cache. All systems take turns in one process, softmax among them, and a ratio is
the median of the ratios within a round: what else the machine does falsifies
all alike. Systems are those of `joma.systems.names`, with their defaults, or
the entries of --entries. One that cannot be timed says why in its row.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from joma.systems import names
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import model as models
from joma.transformer.text import batches
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step
from launch.bench import harness
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

Turn = Callable[[], object]
_COLUMNS: harness.Columns = {
    "system": ("system", str),
    "train_ms": ("training step ms", "{:.1f}".format),
    "train_ratio": ("by softmax", "{:.2f}".format),
    "decode_ms": ("decode step ms", "{:.2f}".format),
    "decode_ratio": ("by softmax", "{:.2f}".format),
    "note": ("note", str),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """Sizes and rounds.

  Attributes:
    entries: Attention systems to time, each by itself, as moba:k=8; none is
      every system with its defaults.
    train_length: Tokens of a text in training.
    decode_length: Tokens of a text that ends with the decode step.
    batch_size: Number of texts in a step.
    embed_dim: Width D of the residual stream.
    num_heads: Number of query heads.
    num_kv_heads: Number of key and value heads.
    head_dim: Size of a head.
    num_rounds: Rounds of turns that count.
  """

  entries: tuple[str, ...] = ()
  train_length: int = 512
  decode_length: int = 4096
  batch_size: int = 2
  embed_dim: int = 256
  num_heads: int = 8
  num_kv_heads: int = 2
  head_dim: int = 64
  num_rounds: int = 9

  def __post_init__(self):
    for name in ("train_length", "decode_length", "batch_size", "num_rounds"):
      require.at_least(name, getattr(self, name), 1)
    for entry in self.entries:
      names.parts(entry)

  def model(self, entry: str) -> configs.TransformerConfig:
    """The model of an entry."""
    return configs.TransformerConfig(
        num_layers=1,
        embed_dim=self.embed_dim,
        num_heads=self.num_heads,
        num_kv_heads=self.num_kv_heads,
        head_dim=self.head_dim,
        hidden_dim=self.embed_dim,
        max_len=max(self.train_length, self.decode_length),
        attention=(entry,),
    )


def train_turn(config: BenchConfig, entry: str) -> Turn:
  """Returns what takes a training step."""
  lm = lm_config.LmConfig(
      model=config.model(entry),
      batch_size=config.batch_size,
      seq_len=config.train_length,
  )
  task = lm_step.make_task(lm, 100, 100)
  shape = (1, config.batch_size, config.train_length)
  tokens = np.random.default_rng(0).integers(0, 256, shape, np.int32)
  batch = batches.Batch(
      tokens, np.roll(tokens, -1, axis=-1), np.ones(shape, np.float32)
  )
  step = jax.jit(functools.partial(lm_step.train, task=task), donate_argnums=0)
  return _repeat(lambda state: step(state, batch)[0], lm_step.init(task))


def decode_turn(config: BenchConfig, entry: str) -> Turn:
  """Returns what takes a decode step; its cache is written in place."""
  shape = config.model(entry)
  model = models.Transformer(shape)
  one = jnp.zeros((config.batch_size, 1), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(0), one)["params"]
  place = jnp.full_like(one, config.decode_length - 1)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(caches: PyTree) -> PyTree:
    logits, caches = model.apply(
        {"params": params}, one, positions=place, kv_cache=caches
    )
    # Else the products would be left out.
    return caches, logits

  caches = full_cache.init(shape, config.batch_size, config.decode_length)
  return _repeat(lambda caches: step(caches)[0], caches)


def _repeat(step: Callable[[PyTree], PyTree], state: PyTree) -> Turn:
  """Returns what steps from where it was, and waits."""
  kept = [state]

  def turn() -> None:
    kept[0] = jax.block_until_ready(step(kept[0]))

  return turn


_TURNS = {"train": train_turn, "decode": decode_turn}


def measure(config: BenchConfig) -> harness.Row:
  """Times, prints the table, and returns it with the machine's facts."""
  entries = (names.PLAIN, *(config.entries or sorted(names.SYSTEMS)))
  rows: dict[str, dict[str, Any]] = {
      entry: {"system": entry, "note": ""} for entry in entries
  }
  for what, make in _TURNS.items():
    turns: dict[str, Turn] = {}
    for entry in entries:
      try:
        turn = make(config, entry)
        turn()  # Compiles: what cannot be is told in its row.
      except errors.UserError as error:
        rows[entry]["note"] += f"{what}: {error} "
      else:
        turns[entry] = turn
    for entry, row in _times(turns, config.num_rounds).items():
      rows[entry] |= {f"{what}_{name}": value for name, value in row.items()}
  found = list(rows.values())
  print(harness.table(_COLUMNS, found), flush=True)
  return {"machine": harness.machine_facts(), "rows": found}


def _times(turns: dict[str, Turn], num_rounds: int) -> dict[str, harness.Row]:
  seconds = harness.take_turns(turns, num_rounds)
  return {
      entry: {
          "ms": 1e3 * float(np.median(found)),
          "ratio": harness.ratio(found, seconds[names.PLAIN]),
      }
      for entry, found in seconds.items()
  }


if __name__ == "__main__":
  harness.run(BenchConfig(), measure)
