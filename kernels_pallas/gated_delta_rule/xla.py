"""The gated delta rule by XLA, chunk by chunk; what CPUs run.

The algebra of a chunk is `chunk`'s, mapped over batch and heads; states go from
chunk to chunk. The backward makes the state of each chunk's start again, and
keeps those: T / C of them. Triangular systems are solved by products, not by
LAPACK: its calls, within a loop, wait for ever for a thread of XLA's when there
are two (jaxlib 0.10.2).
"""

import dataclasses

from jax import lax
from jaxtyping import Array, Float

from kernels_pallas import implementations
from kernels_pallas.gated_delta_rule import cutting
from kernels_pallas.gated_delta_rule import operands as operands_lib
from kernels_pallas.gated_delta_rule.algebra import chunk as chunk_lib
from kernels_pallas.gated_delta_rule.algebra import fading
from kernels_pallas.gated_delta_rule.algebra import inverse
from kernels_pallas.gated_delta_rule.algebra import products

# Channels of a head up to which short chunks pay.
_SMALL = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes.

  Attributes:
    chunk: Positions that are computed together, a power of 2. None is 64 where
      decays are by head, and 32 by channel, whose pairs cost more; 32 too
      where keys and values have 32 channels at most, beside which pairs cost
      the most.
  """

  chunk: int | None = None

  def __post_init__(self):
    chunk = self.chunk
    if chunk is not None and (chunk < 1 or chunk & (chunk - 1)):
      raise ValueError(f"chunk={chunk} must be a power of 2, such as 64")


def forward(
    operands: operands_lib.Operands,
    scale: float,
    config: implementations.Config,
) -> operands_lib.Results:
  """Computes the op."""
  chunks = _cut(operands, config)

  def visit(state: Array, arrays: cutting.Chunks) -> tuple[Array, Array]:
    out, state = cutting.mapped(_forward, arrays, state)
    return state, (scale * out).astype(operands.query.dtype)

  state, out = lax.scan(visit, operands.state, chunks)
  return cutting.join(out, operands.query.shape[1]), state


def backward(
    operands: operands_lib.Operands,
    cotangents: operands_lib.Results,
    scale: float,
    config: implementations.Config,
) -> operands_lib.Operands:
  """Computes the cotangents; those of query and key for each of N heads."""
  length, dtype = operands.value.shape[1], operands.state.dtype
  chunks = _cut(operands, config)
  d_out = cutting.to_chunks(cotangents[0], chunks[2].shape[3])

  def advance(state: Array, arrays: cutting.Chunks) -> tuple[Array, Array]:
    return cutting.mapped(_advance, arrays, state), state

  def visit(
      d_state: Array, arrays: tuple[cutting.Chunks, Array, Array]
  ) -> tuple[Array, tuple[Array, ...]]:
    chunks, state, d_out = arrays
    d_out = scale * d_out.astype(dtype)
    *found, d_state = cutting.mapped(_backward, chunks, state, d_out, d_state)
    # Sums of several heads' are made of what is not rounded.
    is_grouped = operands.key.shape[2] < operands.value.shape[2]
    types = [dtype if is_grouped else x.dtype for x in operands[:2]]
    types += [x.dtype for x in operands[2:5]]
    return d_state, tuple(map(lax.convert_element_type, found, types))

  _, states = lax.scan(advance, operands.state, chunks)
  d_state, found = lax.scan(
      visit, cotangents[1], (chunks, states, d_out), reverse=True
  )
  found = (cutting.join(x, length) for x in found)
  d_query, d_key, d_value, d_log_decay, d_beta = found
  return operands_lib.Operands(
      d_query, d_key, d_value, d_log_decay, d_beta[..., 0], d_state
  )


def _cut(
    operands: operands_lib.Operands, config: implementations.Config
) -> cutting.Chunks:
  largest = max(operands.query.shape[3], operands.value.shape[3])
  is_costly = operands.log_decay.shape[3] > 1 or largest <= _SMALL
  best = 32 if is_costly else 64
  return cutting.cut(operands, (config or Config()).chunk or best)


def _forward(
    chunk: chunk_lib.Chunk, log_decay: Float[Array, "C D"]
) -> tuple[Array, Array]:
  return chunk_lib.forward(
      chunk,
      fading.of(products.Products(log_decay.dtype), log_decay),
      inverse.Solver,
  )


def _advance(
    chunk: chunk_lib.Chunk, log_decay: Float[Array, "C D"]
) -> Float[Array, "H J"]:
  return chunk_lib.advance(
      chunk,
      fading.of(products.Products(log_decay.dtype), log_decay),
      inverse.Solver,
  )


def _backward(
    chunk: chunk_lib.Chunk,
    log_decay: Float[Array, "C D"],
    d_out: Float[Array, "C J"],
    d_state: Float[Array, "H J"],
) -> tuple[Array, ...]:
  fades = fading.of(products.Products(log_decay.dtype), log_decay)
  found, d_logs = chunk_lib.backward(
      chunk, fades, d_out, d_state, inverse.Solver
  )
  d_logs = d_logs.T if isinstance(fades, fading.ByHead) else d_logs
  return *found[:3], d_logs, *found[3:]
