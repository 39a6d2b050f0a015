"""Sequences cut into chunks, and the algebra mapped over them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.gated_delta_rule import operands as operands_lib
from kernels_pallas.gated_delta_rule.algebra import chunk as chunk_lib

# Of query, key, value, log_decay and beta.
Chunks = tuple[Array, Array, Array, Array, Array]


def cut(operands: operands_lib.Operands, longest: int) -> Chunks:
  """Of at most `longest` positions, a power of 2; as few as are needed."""
  query, key, value, log_decay, beta, _ = operands
  chunk = min(longest, 1 << (query.shape[1] - 1).bit_length())
  arrays = (query, key, value, log_decay, beta[..., None])
  query, key, value, log_decay, beta = (to_chunks(x, chunk) for x in arrays)
  return query, key, value, log_decay, beta


def to_chunks(
    x: Float[Array, "B T n H"], chunk: int
) -> Float[Array, "c B n C H"]:
  """Zeros at the end add nothing to a state, and let it as it is."""
  batch, length, num_heads, size = x.shape
  x = jnp.pad(x, ((0, 0), (0, -length % chunk), (0, 0), (0, 0)))
  x = x.reshape(batch, -1, chunk, num_heads, size)
  return jnp.moveaxis(x, (1, 2), (0, 3))


def join(x: Float[Array, "c B n C H"], length: int) -> Float[Array, "B T n H"]:
  """Back, without what was added at the end."""
  x = jnp.moveaxis(x, (0, 3), (1, 2))
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def mapped(
    function: Callable[..., Any],
    chunks: Chunks,
    *states: Float[Array, "B N _ _"],
) -> Any:
  """function(chunk, log_decay, *others) of each sequence and head.

  Args:
    function: Of a chunk in the type of the sums, which is that of the states.
    chunks: Of each sequence; heads may share query and key.
    *states: The state of the chunk, and the others.
  """
  dtype, num_heads = states[0].dtype, states[0].shape[1]
  query, key, value, log_decay, beta = (
      jnp.repeat(x.astype(dtype), num_heads // x.shape[1], axis=1)
      for x in chunks
  )
  chunk = chunk_lib.Chunk(query, key, value, beta, states[0])
  return jax.vmap(jax.vmap(function))(chunk, log_decay, *states[1:])
