"""The gated delta rule by XLA, chunk by chunk; what CPUs run.

The algebra of a chunk is `chunk`'s, mapped over batch and heads; states go from
chunk to chunk. The backward makes the state of each chunk's start again, and
keeps those: T / C of them.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import implementations
from kernels_pallas.gated_delta_rule import operands as operands_lib
from kernels_pallas.gated_delta_rule.algebra import chunk as chunk_lib
from kernels_pallas.gated_delta_rule.algebra import fading
from kernels_pallas.gated_delta_rule.algebra import products

# Of query, key, value, log_decay and beta.
_Chunks = tuple[Array, Array, Array, Array, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes.

  Attributes:
    chunk: Positions that are computed together, a power of 2.
  """

  chunk: int = 64

  def __post_init__(self):
    if self.chunk < 1 or self.chunk & (self.chunk - 1):
      raise ValueError(f"chunk={self.chunk} must be a power of 2, such as 64")


def forward(
    operands: operands_lib.Operands,
    scale: float,
    config: implementations.Config,
) -> operands_lib.Results:
  """Computes the op."""
  chunks = _cut(operands, config)

  def visit(state: Array, arrays: _Chunks) -> tuple[Array, Array]:
    out, state = _mapped(_forward, arrays, state)
    return state, (scale * out).astype(operands.query.dtype)

  state, out = lax.scan(visit, operands.state, chunks)
  return _join(out, operands.query.shape[1]), state


def backward(
    operands: operands_lib.Operands,
    cotangents: operands_lib.Results,
    scale: float,
    config: implementations.Config,
) -> operands_lib.Operands:
  """Computes the cotangents; those of query and key for each of N heads."""
  length, dtype = operands.value.shape[1], operands.state.dtype
  chunks = _cut(operands, config)
  d_out = _to_chunks(cotangents[0], chunks[2].shape[3])

  def advance(state: Array, arrays: _Chunks) -> tuple[Array, Array]:
    return _mapped(_advance, arrays, state), state

  def visit(
      d_state: Array, arrays: tuple[_Chunks, Array, Array]
  ) -> tuple[Array, tuple[Array, ...]]:
    chunks, state, d_out = arrays
    d_out = scale * d_out.astype(dtype)
    *found, d_state = _mapped(_backward, chunks, state, d_out, d_state)
    # Sums of several heads' are made of what is not rounded.
    is_grouped = operands.key.shape[2] < operands.value.shape[2]
    types = [dtype if is_grouped else x.dtype for x in operands[:2]]
    types += [x.dtype for x in operands[2:5]]
    return d_state, tuple(map(lax.convert_element_type, found, types))

  _, states = lax.scan(advance, operands.state, chunks)
  d_state, found = lax.scan(
      visit, cotangents[1], (chunks, states, d_out), reverse=True
  )
  found = (_join(x, length) for x in found)
  d_query, d_key, d_value, d_log_decay, d_beta = found
  return operands_lib.Operands(
      d_query, d_key, d_value, d_log_decay, d_beta[..., 0], d_state
  )


def _cut(
    operands: operands_lib.Operands, config: implementations.Config
) -> _Chunks:
  query, key, value, log_decay, beta, _ = operands
  longest = (config or Config()).chunk
  # No longer than the sequence needs.
  chunk = min(longest, 1 << (query.shape[1] - 1).bit_length())
  arrays = (query, key, value, log_decay, beta[..., None])
  query, key, value, log_decay, beta = (_to_chunks(x, chunk) for x in arrays)
  return query, key, value, log_decay, beta


def _to_chunks(
    x: Float[Array, "B T n H"], chunk: int
) -> Float[Array, "c B n C H"]:
  """Zeros at the end add nothing to a state, and let it as it is."""
  batch, length, num_heads, size = x.shape
  x = jnp.pad(x, ((0, 0), (0, -length % chunk), (0, 0), (0, 0)))
  x = x.reshape(batch, -1, chunk, num_heads, size)
  return jnp.moveaxis(x, (1, 2), (0, 3))


def _join(x: Float[Array, "c B n C H"], length: int) -> Float[Array, "B T n H"]:
  x = jnp.moveaxis(x, (0, 3), (1, 2))
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _mapped(
    function: Callable[..., Any],
    chunks: _Chunks,
    *states: Float[Array, "B N _ _"],
) -> Any:
  """function(chunk, log_decay, *others) of each sequence and head."""
  dtype, num_heads = states[0].dtype, states[0].shape[1]
  query, key, value, log_decay, beta = (
      jnp.repeat(x.astype(dtype), num_heads // x.shape[1], axis=1)
      for x in chunks
  )
  chunk = chunk_lib.Chunk(query, key, value, beta, states[0])
  return jax.vmap(jax.vmap(function))(chunk, log_decay, *states[1:])


def _forward(
    chunk: chunk_lib.Chunk, log_decay: Float[Array, "C D"]
) -> tuple[Array, Array]:
  return chunk_lib.forward(chunk, _fades(log_decay), _Solver)


def _advance(
    chunk: chunk_lib.Chunk, log_decay: Float[Array, "C D"]
) -> Float[Array, "H J"]:
  return chunk_lib.advance(chunk, _fades(log_decay), _Solver)


def _backward(
    chunk: chunk_lib.Chunk,
    log_decay: Float[Array, "C D"],
    d_out: Float[Array, "C J"],
    d_state: Float[Array, "H J"],
) -> tuple[Array, ...]:
  fades = _fades(log_decay)
  found = chunk_lib.backward(chunk, fades, d_out, d_state, _Solver)
  if isinstance(fades, fading.ByHead):
    found = found._replace(log_decay=found.log_decay.T)
  return tuple(found)


def _fades(log_decay: Float[Array, "C D"]) -> fading.Fading:
  product = products.Products(log_decay.dtype)
  if log_decay.shape[1] == 1:
    return fading.ByHead.of(product, log_decay.T)
  return fading.ByChannel.of(product, log_decay)


@dataclasses.dataclass(frozen=True)
class _Solver:
  """Substitution, see `chunk.Solver`."""

  lower: Float[Array, "C C"]
  product: products.Products

  def __call__(
      self, right: Float[Array, "C J"], *, is_transposed: bool = False
  ) -> Float[Array, "C J"]:
    """Solves, see `chunk.Solver`."""
    return lax.linalg.triangular_solve(
        self.lower,
        right,
        left_side=True,
        lower=True,
        transpose_a=is_transposed,
        unit_diagonal=True,
    )
