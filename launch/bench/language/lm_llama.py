"""A training step of a Llama on the CPU, here and in transformers.

The same shape, batch and optimizer: float32, AdamW with clipping, attention by
`scaled_dot_product_attention` there. Values differ, for each draws its own;
`tests/joma/transformer/hf` holds that equal values have equal logits.

Letters: L layers, D width, T positions, B batch, V vocabulary.
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib
from typing import Any

import jax
import numpy as np

from joma.transformer import config as config_lib
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step
from launch.bench import harness
from launch.bench import torch_peer
from launch.bench.language import lm_sizes
from launch.bench.language import lm_train


def measure(config: lm_sizes.LmBenchConfig) -> list[harness.Row]:
  """Times both in turns at each size; returns a row a size."""
  sizes = (map(int, text.split("x")) for text in config.llama_sizes)
  return [_measure(config, tuple(size)) for size in sizes]


def _measure(
    config: lm_sizes.LmBenchConfig, size: tuple[int, ...]
) -> harness.Row:
  settings = settings_of(size)
  task = lm_step.make_task(settings, config.num_steps, config.num_steps)
  state = jax.jit(functools.partial(lm_step.init, task=task))()
  text = lm_train.random_text(
      config, settings.batch_size, settings.seq_len, settings.model
  )
  train = jax.jit(functools.partial(lm_step.train, task=task), donate_argnums=0)
  memory = train.lower(state, text).compile().memory_analysis()
  turns: dict[str, Callable[[], object]] = {}
  if config.torch:
    turns["transformers"] = _transformers(settings, text)
  turns["ours"] = lm_train.turn_of(task, state, text)
  seconds = harness.take_turns(
      turns, config.num_rounds, num_steps=config.num_steps, pause_s=0.05
  )
  row: harness.Row = dict(zip(("L", "D", "T", "B", "V"), size, strict=True))
  row["ours_ms"] = 1e3 * float(np.median(seconds["ours"]))
  row["temporary_mb"] = memory.temp_size_in_bytes / 1e6 if memory else None
  if config.torch:
    theirs = seconds["transformers"]
    row["transformers_ms"] = 1e3 * float(np.median(theirs))
    row["transformers over ours"] = harness.ratio(theirs, seconds["ours"])
  return row


def settings_of(size: tuple[int, ...]) -> lm_config.LmConfig:
  """The default run with a model of L, D, T, B and V, heads of 32 or 64."""
  num_layers, width, seq_len, batch_size, vocab_size = size
  head_dim = 64 if width % 64 == 0 and width > 128 else min(32, width)
  model = config_lib.TransformerConfig(
      vocab_size=vocab_size,
      num_layers=num_layers,
      embed_dim=width,
      num_heads=width // head_dim,
      num_kv_heads=width // head_dim,
      head_dim=head_dim,
      hidden_dim=4 * width,
  )
  return dataclasses.replace(
      lm_config.default(),
      model=model,
      batch_size=batch_size,
      seq_len=seq_len,
  )


def _transformers(
    settings: lm_config.LmConfig, text: Any
) -> Callable[[], object]:
  torch = torch_peer.load()
  model = _llama(settings)
  params = list(model.parameters())
  optimizer = torch.optim.AdamW(
      params,
      lr=settings.lr,
      betas=(settings.beta_1, settings.beta_2),
      weight_decay=settings.weight_decay,
      fused=True,
  )
  inputs, targets = (
      torch.tensor(tokens, dtype=torch.long)
      for tokens in (text.inputs, text.targets)
  )

  def turn() -> None:
    for tokens, wanted in zip(inputs, targets, strict=True):
      optimizer.zero_grad()
      logits = model(input_ids=tokens).logits
      torch.nn.functional.cross_entropy(
          logits.flatten(0, 1), wanted.flatten()
      ).backward()
      torch.nn.utils.clip_grad_norm_(params, settings.clip_norm)
      optimizer.step()

  return turn


def _llama(settings: lm_config.LmConfig) -> Any:
  transformers = importlib.import_module("transformers")
  model = settings.model
  return transformers.LlamaForCausalLM(
      transformers.LlamaConfig(
          vocab_size=model.vocab_size,
          hidden_size=model.embed_dim,
          intermediate_size=model.hidden_dim,
          num_hidden_layers=model.num_layers,
          num_attention_heads=model.num_heads,
          num_key_value_heads=model.num_kv_heads,
          head_dim=model.head_dim,
          max_position_embeddings=model.max_len,
          rms_norm_eps=model.norm_epsilon,
          tie_word_embeddings=model.tie_embeddings,
          attn_implementation="sdpa",
          use_cache=False,
      )
  ).train()
