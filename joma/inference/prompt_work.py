"""What prompts take to read, known before anything is allocated."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from joma.inference.cost import model_size
from joma.transformer import config as configs
from joma.transformer.text import sizes
from scansnap_jax.experiment import require


def flop(config: configs.TransformerConfig, lengths: Sequence[int]) -> float:
  """Returns the operations of reading texts.

  2 P T of parameters and, in each layer, 2 T^2 N H of attention: the products
  of queries with keys and of weights with values, half of them masked.

  Args:
    config: The model's.
    lengths: T of each text.
  """
  parameters = model_size.count(config).total
  width = config.num_layers * config.num_heads * config.head_dim
  return float(sum(2 * parameters * t + 2 * width * t**2 for t in lengths))


def capacity(
    config: configs.TransformerConfig,
    batch_size: int,
    num_positions: int,
    dtype: DTypeLike,
) -> int:
  """Returns the positions of caches that keep everything.

  Args:
    config: The model's.
    batch_size: B.
    num_positions: Of the longest text, prompt and continuation.
    dtype: Of keys and values.

  Raises:
    UserError: If no memory holds them.
  """
  size = sizes.capacity(num_positions, config)
  heads = batch_size * config.num_layers * config.num_kv_heads
  num_bytes = 2 * jnp.dtype(dtype).itemsize * heads * config.head_dim
  require.memory(
      f"a cache of {size} positions ({num_positions} of prompt and"
      " max_new_tokens)",
      num_bytes * size,
  )
  return size


def check_whole(
    config: configs.TransformerConfig, lengths: Sequence[int], dtype: DTypeLike
) -> None:
  """Raises UserError if no memory holds prompts that are read at once.

  Policies choose among whole prompts. The least that a layer needs at a time:
  the residual stream twice, and queries, keys, values and what heads put out.

  Args:
    config: The model's.
    lengths: Tokens of each prompt.
    dtype: Of activations.
  """
  heads = 2 * (config.num_heads + config.num_kv_heads)
  width = 2 * config.embed_dim + heads * config.head_dim
  padded = sizes.length(max(lengths), config)
  require.memory(
      f"a prompt of {max(lengths)} tokens, read at once for a cache that"
      " evicts,",
      len(lengths) * padded * width * jnp.dtype(dtype).itemsize,
  )
