"""Measures a training step of Table 1's Transformer, against PyTorch.

  python -m launch.bench.joma --output=bench.json

prints a table for each width and set size and writes the same numbers as JSON.
`plain` is the model written down: every sequence of the batch, every position.
The rows below it leave out work that changes neither loss nor gradient, one
saving at a time and then all of them, in PyTorch too:

  last     the last block at the last position alone
  padding  one copy of the padding that all sequences begin with
  counts   each class once, weighted by how often it was drawn
  all      the three together

All rows take turns, round by round, in one process, each with all cores; the
median over rounds counts, and ratios are medians of ratios within a round.
Every row starts from the same parameters; `first_loss` is its loss of the same
batch.

Other programs on the machine falsify the times.
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import pathlib
import statistics
import time
from typing import Any, NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from joma.hierarchy import data
from joma.hierarchy import model as hierarchy_model
from joma.hierarchy import run as hierarchy_train
from launch import app
from launch import flag_config
from launch.bench import scansnap
from scansnap_jax.experiment import devices
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import workdir as workdir_lib

_PAUSE_S = 0.05


class Savings(NamedTuple):
  """Which work a row leaves out."""

  counts: bool = False
  padding: bool = False
  last: bool = False


_SAVINGS = {
    "plain": Savings(),
    "last": Savings(last=True),
    "padding": Savings(padding=True),
    "counts": Savings(counts=True),
    "all": Savings(True, True, True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """What to measure, and its sizes; smaller ones are for tests.

  Attributes:
    torch: Measure PyTorch too.
    embed_dims: Widths D.
    set_sizes: Latents that each latent combines: 2 leaves much padding, 3
      little.
    num_classes: Number of classes K.
    num_layers: Number of blocks.
    seq_len: Sequence length T.
    batch_size: Batch size B.
    num_rounds: Rounds, of which the median counts.
    num_steps: Steps of a turn.
    seed: Seed of the hierarchy and of the parameters.
  """

  torch: bool = True
  embed_dims: tuple[int, ...] = (128, 1024)
  set_sizes: tuple[int, ...] = (2, 3)
  num_classes: int = 20
  num_layers: int = 3
  seq_len: int = 30
  batch_size: int = 128
  num_rounds: int = 5
  num_steps: int = 2
  seed: int = 1


# Whoever imports this module for its functions gets no flags.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_OUTPUT = flags.DEFINE_string(
    "output", None, "JSON file to write.", flag_values=_FLAGS
)
_CONFIG = flag_config.define(BenchConfig(), flag_values=_FLAGS)


@dataclasses.dataclass(frozen=True)
class Row:
  """One way to take steps.

  Attributes:
    name: In the table.
    first_loss: Loss of the common first batch at the common parameters.
    turn: Takes the steps of a turn.
  """

  name: str
  first_loss: float
  turn: Callable[[], Any]


def main(_: list[str]) -> None:
  """Measures, prints, writes."""
  output = _OUTPUT.value
  if output and not pathlib.Path(output).absolute().parent.is_dir():
    raise errors.UserError(f"--output={output} is in no folder that exists")
  devices.set_up(num_cpu_devices=1)  # One run has all cores.
  results = measure(_CONFIG())
  if output:
    workdir_lib.write_atomic(output, json.dumps(results, indent=2) + "\n")


def measure(config: BenchConfig) -> dict[str, Any]:
  """Makes and prints the measurements of each width and set size.

  Raises:
    UserError: If PyTorch is to be measured and is not installed.
  """
  if config.torch and importlib.util.find_spec("torch") is None:
    raise errors.UserError(
        "PyTorch is not installed: pip install 'scansnap-jax[bench]', or give"
        " --notorch"
    )
  results: dict[str, Any] = {"machine": scansnap.machine_facts()}
  for name, fact in results["machine"].items():
    print(f"{name:<12}{fact}", flush=True)
  for width in config.embed_dims:
    for size in config.set_sizes:
      name = f"d={width}, sets of {size}"
      table = take_turns(make_rows(config, width, size), config)
      results[name] = table
      print(f"\n{name}")
      for line in [table[0].keys(), *(row.values() for row in table)]:
        print("".join(f"{_show(x):>22}" for x in line), flush=True)
  return results


def _show(value: Any) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def take_turns(rows: list[Row], config: BenchConfig) -> list[dict[str, Any]]:
  """Times the rows in turns; returns a table, ratios to the plain rows."""
  for row in rows:  # Warms up.
    row.turn()
  rounds = [
      {row.name: _seconds_per_step(row, config.num_steps) for row in rows}
      for _ in range(config.num_rounds)
  ]
  ratio = lambda a, b: statistics.median(
      times[a] / times[b] for times in rounds
  )
  plain = [row.name for row in rows if row.name.endswith(" plain")]
  return [
      {
          "row": row.name,
          "first_loss": row.first_loss,
          "step_ms": 1e3 * statistics.median(t[row.name] for t in rounds),
          "least_ms": 1e3 * min(t[row.name] for t in rounds),
      }
      | {f"{name} over it": ratio(name, row.name) for name in plain}
      for row in rows
  ]


def _seconds_per_step(row: Row, num_steps: int) -> float:
  time.sleep(_PAUSE_S)  # Threads of the row before may still be spinning.
  started = time.monotonic()
  row.turn()
  return (time.monotonic() - started) / num_steps


def make_rows(config: BenchConfig, width: int, set_size: int) -> list[Row]:
  """Builds what is to be timed."""
  latents = data.make_hierarchy(
      config.seed,
      num_latents=(10, 20, config.num_classes),
      set_sizes=(set_size,) * 3,
  )
  model = hierarchy_model.HierarchyTransformer(
      latents.num_tokens,
      config.num_classes,
      num_layers=config.num_layers,
      embed_dim=width,
      hidden_dim=4 * latents.num_tokens,
  )
  tokens = data.to_tokens(latents.is_present, config.seq_len)
  merged = data.merge_padding(tokens, latents.max_tokens)
  rows = []
  for name, savings in _SAVINGS.items():
    run = _make_run(config, *(merged if savings.padding else (tokens, 1)))
    rows.append(_jax_row(f"jax {name}", config, model, run, savings))
    if config.torch and name in ("plain", "all"):
      rows.append(_torch_row(f"torch {name}", config, model, run, savings))
  return rows


def _make_run(
    config: BenchConfig, tokens: np.ndarray, num_padding: int
) -> hierarchy_train.Run:
  """Rate and decay are those of Table 1; times do not depend on them."""
  return hierarchy_train.Run(
      seed=jnp.int32(config.seed),
      lr=jnp.float32(1e-4),
      weight_decay=jnp.float32(1e-4),
      tokens=jnp.asarray(tokens),
      num_padding=jnp.int32(num_padding),
      latents=None,
  )


def _jax_row(
    name: str,
    config: BenchConfig,
    model: hierarchy_model.HierarchyTransformer,
    run: hierarchy_train.Run,
    savings: Savings,
) -> Row:
  state = jax.jit(functools.partial(hierarchy_train.init, model=model))(run)
  descend = functools.partial(
      hierarchy_train.descend,
      model=model,
      batch_size=config.batch_size,
      num_steps=config.num_steps,
      count_classes=savings.counts,
      last_only=savings.last,
  )
  # Every turn starts anew: the state is not donated.
  compiled = jax.jit(descend).lower(state).compile()
  first_loss = float(compiled(state)[1][0])
  return Row(name, first_loss, lambda: jax.block_until_ready(compiled(state)))


def _torch_row(
    name: str,
    config: BenchConfig,
    model: hierarchy_model.HierarchyTransformer,
    run: hierarchy_train.Run,
    savings: Savings,
) -> Row:
  torch = importlib.import_module("torch")
  torch.set_num_threads(devices.num_cores())
  init = jax.jit(functools.partial(hierarchy_train.init, model=model))
  params = to_torch(init(run).params)
  optimizer = torch.optim.Adam(
      jax.tree.leaves(params), lr=1e-4, weight_decay=1e-4, fused=True
  )
  tokens = torch.tensor(np.array(run.tokens), dtype=torch.long)
  num_padding, num_classes = int(run.num_padding), len(tokens)
  cross_entropy = torch.nn.functional.cross_entropy

  def loss_of(drawn):
    if not savings.counts:
      logits = torch_logits(params, tokens[drawn], num_padding, savings.last)
      return cross_entropy(logits, drawn)
    weights = torch.bincount(drawn, minlength=num_classes) / len(drawn)
    logits = torch_logits(params, tokens, num_padding, savings.last)
    labels = torch.arange(num_classes)
    return weights @ cross_entropy(logits, labels, reduction="none")

  def turn():
    for _ in range(config.num_steps):
      optimizer.zero_grad()
      loss_of(torch.randint(num_classes, (config.batch_size,))).backward()
      optimizer.step()

  first = hierarchy_train.draw_labels(
      run.seed, jnp.int32(0), num_classes, config.batch_size
  )
  first_loss = loss_of(torch.tensor(np.array(first), dtype=torch.long)).item()
  return Row(name, first_loss, turn)


def to_torch(params: Any) -> Any:
  """Copies a tree of parameters into trainable tensors."""
  torch = importlib.import_module("torch")
  return jax.tree.map(
      lambda leaf: torch.tensor(np.array(leaf)).requires_grad_(), params
  )


def torch_logits(
    params: dict[str, Any],
    tokens: Any,
    num_padding: int = 1,
    last_only: bool = False,
) -> Any:
  """The model of hierarchy_model.py in PyTorch."""
  torch = importlib.import_module("torch")
  stream = params["embedding"][tokens]
  length, width = stream.shape[1:]
  bias = torch.full((length, length), -torch.inf).triu(1)
  bias[:, 0] += math.log(num_padding)
  blocks = [params[name] for name in sorted(params) if "block_" in name]
  for i, p in enumerate(blocks):
    is_cut = last_only and i == len(blocks) - 1
    ending = stream[:, -1:] if is_cut else stream
    query, key = ending @ p["W_Q"], stream @ p["W_K"]
    attn_logits = query @ key.transpose(1, 2) / width**0.5
    attn_logits = attn_logits + (bias[-1:] if is_cut else bias)
    attended = torch.softmax(attn_logits, dim=2) @ (stream @ p["W_V"])
    middle = _torch_norm(p, "norm_1", ending + attended)
    hidden = torch.relu(middle @ p["mlp_in_w"] + p["mlp_in_b"])
    output = hidden @ p["mlp_out_w"] + p["mlp_out_b"]
    stream = _torch_norm(p, "norm_2", middle + output)
  return stream[:, -1] @ params["classes_w"] + params["classes_b"]


def _torch_norm(params: dict[str, Any], name: str, inputs: Any) -> Any:
  torch = importlib.import_module("torch")
  scale, bias = params[f"{name}_scale"], params[f"{name}_bias"]
  return torch.nn.functional.layer_norm(inputs, scale.shape, scale, bias)


if __name__ == "__main__":
  app.run(main)
