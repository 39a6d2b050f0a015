"""A training step on the CPU, here and in PyTorch.

Letters: B batch, T positions, D width, H head size.
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from joma.transformer import config as config_lib
from joma.transformer.rope import absolute
from joma.transformer.text import batches as batches_lib
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step
from launch.bench import harness
from launch.bench import torch_peer
from launch.bench.language import lm_sizes


def measure(config: lm_sizes.LmBenchConfig) -> list[harness.Row]:
  """Times the rows in turns; returns a table."""
  settings = _settings(config)
  task = lm_step.make_task(settings, config.num_steps, config.num_steps)
  state = jax.jit(functools.partial(lm_step.init, task=task))()
  text = random_text(config, config.batch_size, config.seq_len, settings.model)
  rows = {}
  if config.torch:
    rows["torch"] = _torch(settings, state.params, text)
  rows["jax"] = _jax(task, state, text)  # Gives the state up.
  first = next(iter(rows))
  found = harness.compare(rows, [first], config.num_rounds, config.num_steps)
  num_tokens = config.batch_size * config.seq_len
  return [
      row | {"tokens_per_sec": 1e3 * num_tokens / row["step_ms"]}
      for row in found
  ]


def random_text(
    config: lm_sizes.LmBenchConfig,
    batch_size: int,
    seq_len: int,
    model: config_lib.TransformerConfig,
) -> batches_lib.Batch:
  """Random tokens of as many batches as a turn has steps."""
  rng = np.random.default_rng(config.seed)
  shape = (config.num_steps, batch_size, seq_len)
  draw = functools.partial(rng.integers, 0, model.vocab_size)
  return batches_lib.Batch(
      draw(shape, np.int32), draw(shape, np.int32), np.ones(shape, np.float32)
  )


def turn_of(
    task: lm_step.Task, state: lm_step.TrainState, text: batches_lib.Batch
) -> Callable[[], None]:
  """The steps of `launch.train_lm`, the state given up at each turn."""
  train = jax.jit(functools.partial(lm_step.train, task=task), donate_argnums=0)
  compiled = train.lower(state, text).compile()
  held = [state]

  def turn() -> None:
    held[0], losses = compiled(held[0], text)
    jax.block_until_ready(losses)

  return turn


def _settings(config: lm_sizes.LmBenchConfig) -> lm_config.LmConfig:
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


def _jax(
    task: lm_step.Task, state: lm_step.TrainState, text: batches_lib.Batch
) -> harness.Contestant:
  evaluate = jax.jit(functools.partial(lm_step.evaluate, task=task))
  loss = float(evaluate(state.params, jax.tree.map(lambda x: x[:1], text)))
  return harness.Contestant(loss, turn_of(task, state, text))


def _torch(
    settings: lm_config.LmConfig, params: PyTree, text: batches_lib.Batch
) -> harness.Contestant:
  torch = torch_peer.load()
  params = torch_peer.trainable(params)
  leaves = jax.tree.leaves(params)
  optimizer = torch.optim.Adam(
      leaves,
      lr=settings.lr,
      betas=(settings.beta_1, settings.beta_2),
      fused=True,
  )
  inputs, targets = (
      torch.tensor(tokens, dtype=torch.long)
      for tokens in (text.inputs, text.targets)
  )

  def loss_of(step: int, dropout: float) -> torch_peer.Tensor:
    logits = torch_logits(settings.model, params, inputs[step], dropout)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets[step].flatten()
    )

  def turn() -> None:
    for step in range(len(inputs)):
      optimizer.zero_grad()
      loss_of(step, settings.model.dropout).backward()
      torch.nn.utils.clip_grad_norm_(leaves, settings.clip_norm)
      optimizer.step()

  with torch.no_grad():
    loss = loss_of(0, 0.0).item()
  return harness.Contestant(loss, turn)


def torch_logits(
    model: config_lib.TransformerConfig,
    params: PyTree,
    tokens: torch_peer.Tensor,
    dropout: float,
) -> torch_peer.Tensor:
  """The encoder of `config.authors_encoder` in PyTorch: logits [B, T, V]."""
  torch = importlib.import_module("torch")
  functional = torch.nn.functional
  drop = lambda x: functional.dropout(x, dropout, training=dropout > 0)
  norm = lambda x, p: torch_peer.layer_norm(
      x, p["scale"], p["bias"], model.norm_epsilon
  )
  embedded = functional.embedding(tokens, params["token_embed"]["embedding"])
  places = jnp.arange(tokens.shape[1])[None]
  sinusoids = np.array(absolute.sinusoids(places, model.embed_dim))
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
    stream = norm(stream + drop(update), p["attn_norm"])
    hidden = stream @ mlp["up"]["kernel"] + mlp["up"]["bias"]
    hidden = drop(torch.relu(hidden))
    update = hidden @ mlp["down"]["kernel"] + mlp["down"]["bias"]
    stream = norm(stream + drop(update), p["mlp_norm"])
  return stream @ params["output"]["kernel"] + params["output"]["bias"]
