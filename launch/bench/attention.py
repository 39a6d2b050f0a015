"""Times every attention system beside softmax: a training step, a decode step.

  python -m launch.bench.attention --output=attention.json
  python -m launch.bench.attention --lengths=512,2048,16384 --entries=gdn,moh \
      --folder=runs/attention

A model of one layer takes training steps (loss, gradients, AdamW) on texts of
--train_length tokens, and decode steps with --decode_length - 1 tokens in its
cache; --lengths sets both, for a table each. Each system takes turns with
softmax in one process, and a ratio is the median of the ratios within a round:
what else the machine does falsifies both alike. Systems are those of
`joma.systems.names`, with their defaults, or the entries of --entries. One that
cannot be timed says why in its row. With --folder each row is kept as it ends,
and the same command goes on from there.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from joma.inference.evaluation.protocols import saved_rows
from joma.systems import names
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import model as models
from joma.transformer.text import batches
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step
from launch.bench import harness
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import progress
from scansnap_jax.experiment import require
from scansnap_jax.experiment import workdir as workdir_lib

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
    lengths: Tokens of texts in training and in decoding alike, a table each,
      in place of the two above; none is those two.
    batch_size: Number of texts in a step.
    embed_dim: Width D of the residual stream.
    num_heads: Number of query heads.
    num_kv_heads: Number of key and value heads.
    head_dim: Size of a head.
    num_rounds: Rounds of turns that count.
    folder: Keeps rows as they end, in rows.jsonl: what is there is not measured
      again. None is kept without one.
  """

  entries: tuple[str, ...] = ()
  train_length: int = 512
  decode_length: int = 4096
  lengths: tuple[int, ...] = ()
  batch_size: int = 2
  embed_dim: int = 256
  num_heads: int = 8
  num_kv_heads: int = 2
  head_dim: int = 64
  num_rounds: int = 9
  folder: str = ""

  def __post_init__(self):
    for name in ("train_length", "decode_length", "batch_size", "num_rounds"):
      require.at_least(name, getattr(self, name), 1)
    for length in self.lengths:
      require.at_least("lengths", length, 1)
    for entry in self.entries:
      names.parts(entry)

  def of_lengths(self) -> list["BenchConfig"]:
    """The settings of each table."""
    if not self.lengths:
      return [self]
    change = functools.partial(dataclasses.replace, self, lengths=())
    return [change(train_length=n, decode_length=n) for n in self.lengths]

  def sizes(self) -> dict[str, int]:
    """What a row is of, beside its system."""
    names = [field.name for field in dataclasses.fields(self)]
    left_out = ("entries", "lengths", "folder")
    return {name: getattr(self, name) for name in names if name not in left_out}

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
  """Times, prints the tables, and returns them with the machine's facts."""
  folder = None
  if config.folder:
    folder = json_file.local_path(config.folder)
    workdir_lib.make_folder(folder)
  found: list[harness.Row] = []
  for one in config.of_lengths():
    rows = _table(one, saved_rows.SavedRows(folder, one.sizes()))
    print(f"Training {one.train_length}, decoding {one.decode_length} tokens:")
    print(harness.table(_COLUMNS, rows), flush=True)
    found += [one.sizes() | row for row in rows]
  return {"machine": harness.machine_facts(), "rows": found}


def _table(
    config: BenchConfig, saved: saved_rows.SavedRows
) -> list[harness.Row]:
  """The row of softmax, and one of each system, kept as they end."""
  entries = config.entries or tuple(sorted(names.SYSTEMS))
  rows, plain = [], _Plain(config)
  for entry in dict.fromkeys(entries):
    if entry == names.PLAIN:  # Stands beside each of the others.
      continue
    row = saved.find(system=entry)
    if row is None:
      row = _row(config, entry, plain)
      saved.add(row, system=entry)
      ratios = [f"{row.get(f'{what}_ratio', np.nan):.2f}" for what in _TURNS]
      progress.say(f"{entry}: {' and '.join(ratios)} of softmax. {row['note']}")
    rows.append({"system": entry, **row})
  return [_of_softmax(config, rows, plain), *rows]


def _of_softmax(
    config: BenchConfig, rows: list[harness.Row], plain: "_Plain"
) -> harness.Row:
  """Medians beside all others; its own where there is no other."""
  found: harness.Row = {"system": names.PLAIN, "note": ""}
  for what in _TURNS:
    times = [row[key] for row in rows if (key := f"{what}_beside_ms") in row]
    if not times:
      seconds = harness.take_turns(
          {names.PLAIN: plain.turn(what)}, config.num_rounds, num_warm_ups=0
      )
      times = 1e3 * seconds[names.PLAIN]
    found |= {f"{what}_ms": float(np.median(times)), f"{what}_ratio": 1.0}
  return found


class _Plain:
  """Turns of softmax, each compiled once, where it is first asked for."""

  def __init__(self, config: BenchConfig):
    """Compiles nothing yet."""
    self._config = config
    self._turns: dict[str, Turn] = {}

  def turn(self, what: str) -> Turn:
    """Returns what takes a step."""
    if what not in self._turns:
      self._turns[what] = _TURNS[what](self._config, names.PLAIN)
      self._turns[what]()
    return self._turns[what]


def _row(config: BenchConfig, entry: str, plain: _Plain) -> dict[str, Any]:
  row: dict[str, Any] = {"note": ""}
  for what, make in _TURNS.items():
    try:
      turn = make(config, entry)
      turn()  # Compiles: what cannot be is told in its row.
    except errors.UserError as error:
      row["note"] += f"{what}: {error} "
      continue
    turns = {names.PLAIN: plain.turn(what), entry: turn}
    seconds = harness.take_turns(turns, config.num_rounds, num_warm_ups=0)
    ours, beside = seconds[entry], seconds[names.PLAIN]
    row |= {
        f"{what}_ms": 1e3 * float(np.median(ours)),
        f"{what}_ratio": harness.ratio(ours, beside),
        f"{what}_beside_ms": 1e3 * float(np.median(beside)),
    }
  return row


if __name__ == "__main__":
  harness.run(BenchConfig(), measure)
