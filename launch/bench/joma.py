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

Rows take turns, see `launch.bench.harness`; each has all cores. Every row
starts from the same parameters; `loss` is its loss of the same batch.
"""

import dataclasses
import functools
import importlib
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from joma.hierarchy import data
from joma.hierarchy import model as hierarchy_model
from joma.hierarchy import run as hierarchy_train
from launch.bench import harness
from launch.bench import torch_peer
from scansnap_jax.experiment import require


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

  def __post_init__(self):
    counts = ("num_layers", "num_classes", "seq_len", "batch_size")
    for name in (*counts, "num_rounds", "num_steps"):
      require.at_least(name, getattr(self, name), 1)
    for width in self.embed_dims:
      require.at_least("embed_dims", width, 1)
    for size in self.set_sizes:
      require.at_least("set_sizes", size, 1)
    require.seeds("seed", self.seed)
    width = max(self.embed_dims, default=1)
    require.memory(
        f"batch_size={self.batch_size} of seq_len={self.seq_len} and"
        f" embed_dims={width}",
        4 * self.batch_size * self.seq_len * width,
    )
    require.memory(
        f"num_layers={self.num_layers} of embed_dims={width}",
        4 * self.num_layers * width**2,
    )


def measure(config: BenchConfig) -> harness.Row:
  """Makes and prints the measurements of each width and set size.

  Raises:
    UserError: If PyTorch is to be measured and is not installed.
  """
  harness.require(["torch"] if config.torch else (), "--notorch")
  results: harness.Row = {"machine": harness.machine_facts(names_devices=True)}
  harness.tell("machine", results["machine"])
  for width, size in itertools.product(config.embed_dims, config.set_sizes):
    name = f"d={width}, sets of {size}"
    rows = make_rows(config, width, size)
    plain = [row for row in rows if row.endswith(" plain")]
    results[name] = harness.compare(
        rows, plain, config.num_rounds, config.num_steps
    )
    harness.tell(name, results[name])
  return results


def make_rows(
    config: BenchConfig, width: int, set_size: int
) -> dict[str, harness.Contestant]:
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
  rows = {}
  for name, savings in _SAVINGS.items():
    run = _make_run(config, *(merged if savings.padding else (tokens, 1)))
    rows[f"jax {name}"] = _jax(config, model, run, savings)
    if config.torch and name in ("plain", "all"):
      rows[f"torch {name}"] = _torch(config, model, run, savings)
  return rows


def _make_run(
    config: BenchConfig, tokens: np.ndarray, num_padding: int
) -> hierarchy_train.TableRun:
  """Rate and decay are those of Table 1; times do not depend on them."""
  return hierarchy_train.TableRun(
      seed=jnp.int32(config.seed),
      lr=jnp.float32(1e-4),
      weight_decay=jnp.float32(1e-4),
      tokens=jnp.asarray(tokens),
      num_padding=jnp.int32(num_padding),
      latents=None,
  )


def _jax(
    config: BenchConfig,
    model: hierarchy_model.HierarchyTransformer,
    run: hierarchy_train.TableRun,
    savings: Savings,
) -> harness.Contestant:
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
  return harness.Contestant(
      first_loss, lambda: jax.block_until_ready(compiled(state))
  )


def _torch(
    config: BenchConfig,
    model: hierarchy_model.HierarchyTransformer,
    run: hierarchy_train.TableRun,
    savings: Savings,
) -> harness.Contestant:
  torch = torch_peer.load()
  init = jax.jit(functools.partial(hierarchy_train.init, model=model))
  params = torch_peer.trainable(init(run).params)
  optimizer = torch.optim.Adam(
      jax.tree.leaves(params), lr=1e-4, weight_decay=1e-4, fused=True
  )
  tokens = torch.tensor(np.array(run.tokens), dtype=torch.long)
  num_padding, num_classes = int(run.num_padding), len(tokens)
  cross_entropy = torch.nn.functional.cross_entropy

  def loss_of(drawn: torch_peer.Tensor) -> torch_peer.Tensor:
    if not savings.counts:
      logits = torch_logits(params, tokens[drawn], num_padding, savings.last)
      return cross_entropy(logits, drawn)
    weights = torch.bincount(drawn, minlength=num_classes) / len(drawn)
    logits = torch_logits(params, tokens, num_padding, savings.last)
    labels = torch.arange(num_classes)
    return weights @ cross_entropy(logits, labels, reduction="none")

  def turn() -> None:
    for _ in range(config.num_steps):
      optimizer.zero_grad()
      loss_of(torch.randint(num_classes, (config.batch_size,))).backward()
      optimizer.step()

  first = hierarchy_train.draw_labels(
      run.seed, jnp.int32(0), num_classes, config.batch_size
  )
  first_loss = loss_of(torch.tensor(np.array(first), dtype=torch.long)).item()
  return harness.Contestant(first_loss, turn)


def torch_logits(
    params: dict[str, Any],
    tokens: torch_peer.Tensor,
    num_padding: int = 1,
    last_only: bool = False,
) -> torch_peer.Tensor:
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
    middle = torch_peer.layer_norm(
        ending + attended, p["norm_1_scale"], p["norm_1_bias"]
    )
    hidden = torch.relu(middle @ p["mlp_in_w"] + p["mlp_in_b"])
    output = hidden @ p["mlp_out_w"] + p["mlp_out_b"]
    stream = torch_peer.layer_norm(
        middle + output, p["norm_2_scale"], p["norm_2_bias"]
    )
  return stream[:, -1] @ params["classes_w"] + params["classes_b"]


if __name__ == "__main__":
  harness.run(BenchConfig(), measure)
