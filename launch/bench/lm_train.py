"""A training step on the CPU, here and in PyTorch.

Letters: B batch, T positions, D width, H head size.
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from joma.transformer import config as config_lib
from joma.transformer import model as model_lib
from joma.transformer.text import batches as batches_lib
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step
from scansnap_jax.experiment import devices

_PAUSE_S = 0.05


@dataclasses.dataclass(frozen=True)
class Row:
  """One way to take steps.

  Attributes:
    name: In the table.
    loss: Of the common batch at the common parameters, nothing dropped.
    turn: Takes the steps of a turn.
  """

  name: str
  loss: float
  turn: Callable[[], Any]


def measure(config: Any) -> list[dict[str, Any]]:
  """Times the rows in turns; returns a table."""
  lm = _settings(config)
  task = lm_step.make_task(lm, config.num_steps, config.num_steps)
  state = jax.jit(functools.partial(lm_step.init, task=task))()
  rng = np.random.default_rng(config.seed)
  shape = (config.num_steps, config.batch_size, config.seq_len)
  draw = functools.partial(rng.integers, 0, config.vocab_size)
  text = batches_lib.Batch(
      draw(shape, np.int32), draw(shape, np.int32), np.ones(shape, np.float32)
  )
  rows = []
  if config.torch:
    rows.append(_torch_row(lm, state.params, text))
  rows.append(_jax_row(task, state, text))  # Gives the state up.
  return _take_turns(rows, config)


def _settings(config: Any) -> lm_config.LmConfig:
  """JoMA's Figure 6, in the sizes asked for."""
  encoder = config_lib.authors_encoder(config.vocab_size, config.num_layers)
  width = config.embed_dim
  model = dataclasses.replace(
      encoder,
      embed_dim=width,
      head_dim=width,
      hidden_dim=width,
      embed_scale=width**0.5,
  )
  return dataclasses.replace(
      lm_config.joma_figure6(),
      model=model,
      batch_size=config.batch_size,
      seq_len=config.seq_len,
      seed=config.seed,
  )


def _take_turns(rows: list[Row], config: Any) -> list[dict[str, Any]]:
  for row in rows:  # Warms up.
    row.turn()
  rounds = [
      {row.name: _seconds(row) / config.num_steps for row in rows}
      for _ in range(config.num_rounds)
  ]
  median = lambda of: statistics.median(map(of, rounds))
  return [
      {
          "row": row.name,
          "loss": row.loss,
          "step_ms": 1e3 * median(lambda times, row=row: times[row.name]),
          "least_ms": 1e3 * min(times[row.name] for times in rounds),
          "tokens_per_sec": (
              config.batch_size
              * config.seq_len
              / median(lambda times, row=row: times[row.name])
          ),
          "first over it": median(
              lambda times, row=row: times[rows[0].name] / times[row.name]
          ),
      }
      for row in rows
  ]


def _seconds(row: Row) -> float:
  time.sleep(_PAUSE_S)  # Threads of the row before may still be spinning.
  started = time.monotonic()
  row.turn()
  return time.monotonic() - started


def _jax_row(
    task: lm_step.Task, state: lm_step.TrainState, text: batches_lib.Batch
) -> Row:
  """The steps of `launch.train_lm`, the state given up at each."""
  evaluate = jax.jit(functools.partial(lm_step.evaluate, task=task))
  loss = float(evaluate(state.params, jax.tree.map(lambda x: x[:1], text)))
  train = jax.jit(functools.partial(lm_step.train, task=task), donate_argnums=0)
  compiled = train.lower(state, text).compile()
  held = [state]

  def turn():
    held[0], losses = compiled(held[0], text)
    jax.block_until_ready(losses)

  return Row("jax", loss, turn)


def _torch_row(
    lm: lm_config.LmConfig, params: Any, text: batches_lib.Batch
) -> Row:
  torch = importlib.import_module("torch")
  torch.set_num_threads(devices.num_cores())
  params = jax.tree.map(
      lambda leaf: torch.tensor(np.array(leaf)).requires_grad_(), params
  )
  leaves = jax.tree.leaves(params)
  optimizer = torch.optim.Adam(
      leaves, lr=lm.lr, betas=(lm.beta_1, lm.beta_2), fused=True
  )
  inputs, targets = (
      torch.tensor(tokens, dtype=torch.long)
      for tokens in (text.inputs, text.targets)
  )

  def loss_of(step, dropout):
    logits = torch_logits(lm.model, params, inputs[step], dropout)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets[step].flatten()
    )

  def turn():
    for step in range(len(inputs)):
      optimizer.zero_grad()
      loss_of(step, lm.model.dropout).backward()
      torch.nn.utils.clip_grad_norm_(leaves, lm.clip_norm)
      optimizer.step()

  with torch.no_grad():
    loss = loss_of(0, 0.0).item()
  return Row("torch", loss, turn)


def torch_logits(
    model: config_lib.TransformerConfig,
    params: Any,
    tokens: Any,
    dropout: float,
) -> Any:
  """The encoder of `config.authors_encoder` in PyTorch: logits [B, T, V]."""
  torch = importlib.import_module("torch")
  functional = torch.nn.functional
  drop = lambda x: functional.dropout(x, dropout, training=dropout > 0)
  embedded = functional.embedding(tokens, params["token_embed"]["embedding"])
  places = jnp.arange(tokens.shape[1])[None]
  sinusoids = np.array(model_lib.sinusoids(places, model.embed_dim))
  stream = drop(embedded * model.embed_scale + torch.tensor(sinusoids))
  for layer in range(model.num_layers):
    p = params[f"layers_{layer}"]
    attn, mlp = p["attn"], p["mlp"]
    head = lambda name, x=stream, attn=attn: (  # [B, 1, T, H]
        x @ attn[name]["kernel"][:, 0] + attn[name]["bias"]
    )[:, None]
    out = functional.scaled_dot_product_attention(
        *(head(name) for name in ("query", "key", "value")),
        dropout_p=dropout,
        is_causal=True,
    )
    update = out[:, 0] @ attn["out"]["kernel"][0] + attn["out"]["bias"]
    stream = _torch_norm(model, p["attn_norm"], stream + drop(update))
    hidden = stream @ mlp["up"]["kernel"] + mlp["up"]["bias"]
    hidden = drop(torch.relu(hidden))
    update = hidden @ mlp["down"]["kernel"] + mlp["down"]["bias"]
    stream = _torch_norm(model, p["mlp_norm"], stream + drop(update))
  return stream @ params["output"]["kernel"] + params["output"]["bias"]


def _torch_norm(
    model: config_lib.TransformerConfig, params: Any, x: Any
) -> Any:
  torch = importlib.import_module("torch")
  return torch.nn.functional.layer_norm(
      x, x.shape[-1:], params["scale"], params["bias"], model.norm_epsilon
  )
