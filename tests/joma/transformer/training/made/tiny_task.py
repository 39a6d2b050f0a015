"""A task of one layer, texts drawn, and its steps as programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from joma.transformer import config as config_lib
from joma.transformer.text import batches as batches_lib
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step

CONFIG = lm_config.LmConfig(
    model=config_lib.TransformerConfig(
        vocab_size=11,
        num_layers=1,
        embed_dim=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        hidden_dim=12,
        tie_embeddings=False,
    ),
    batch_size=4,
    seq_len=6,
    optimizer="sgd",
    weight_decay=0.0,
    clip_norm=None,
    warmup_steps=0,
    schedule="constant",
    lr=0.5,
)


def make_task(**changes):
  # The reference compiles soonest.
  config = dataclasses.replace(CONFIG, **changes)
  return lm_step.make_task(config, 10, 5, implementation="reference")


def draw_batches(num_steps, num_rows=4, seq_len=6, seed=0):
  draw = np.random.default_rng(seed).integers
  inputs, targets = draw(0, 11, (2, num_steps, num_rows, seq_len), np.int32)
  return batches_lib.Batch(
      jnp.asarray(inputs), jnp.asarray(targets), jnp.ones(inputs.shape)
  )


init = jax.jit(lm_step.init, static_argnames="task")
train = jax.jit(lm_step.train, static_argnames="task")
