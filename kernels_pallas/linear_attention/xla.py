"""Linear attention by XLA, chunk by chunk; what CPUs run.

Within a chunk the T x T form, between chunks the recurrence (Lightning
Attention-2, https://arxiv.org/abs/2401.04658). Every power of a decay is of an
exponent of 0 or more: nothing overflows. Memory beside the arguments is that of
their chunks: O(T).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kernels_pallas.linear_attention import sweep as sweep_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes.

  Attributes:
    chunk: Positions that are computed together.
  """

  chunk: int = 128

  def __post_init__(self):
    if self.chunk < 1:
      raise ValueError(f"chunk={self.chunk} must be at least 1")


def run(
    operands: sweep_lib.Operands, sweep: sweep_lib.Sweep
) -> sweep_lib.Swept:
  """One sweep, see `sweep`."""
  query, key, value, log_decay, state = operands
  length = query.shape[1]
  chunk = min((sweep.config or Config()).chunk, length)
  chunks = tuple(_cut(x, chunk) for x in (query, key, value))
  lengths = jnp.minimum(chunk, length - jnp.arange(0, length, chunk))
  position = jnp.arange(chunk)
  ago = position[:, None] - position[None]
  ago = -ago if sweep.is_reversed else ago
  weights = jnp.exp(log_decay[:, None, None] * jnp.maximum(ago, 0)[None])
  weights = jnp.where(ago >= 0, weights, 0)
  visit = functools.partial(_visit, sweep, query.dtype, log_decay, weights)
  state, out = jax.lax.scan(
      visit, state, (*chunks, lengths), reverse=sweep.is_reversed
  )
  out = jnp.moveaxis(out, (0, 3), (1, 2))
  out = out.reshape(out.shape[0], -1, *out.shape[3:])
  return out[:, :length], state


def _cut(x: jax.Array, chunk: int) -> jax.Array:
  """[B, T, n, H] to [chunks, B, n, chunk, H]; zeros at the end add nothing."""
  batch, length, num_heads, head_dim = x.shape
  x = jnp.pad(x, ((0, 0), (0, -length % chunk), (0, 0), (0, 0)))
  x = x.reshape(batch, -1, chunk, num_heads, head_dim)
  return jnp.moveaxis(x, (1, 2), (0, 3))


def _visit(
    sweep: sweep_lib.Sweep,
    dtype: jnp.dtype,
    log_decay: jax.Array,
    weights: jax.Array,
    state: jax.Array,
    chunk: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array]:
  """Reads the state of a chunk's start, and makes that of its end."""
  *arrays, length = chunk
  num_heads = log_decay.shape[0]
  query, key, value = (
      jnp.repeat(x.astype(state.dtype), num_heads // x.shape[1], axis=1)
      for x in arrays
  )
  position = jnp.arange(query.shape[2])
  # Steps from the chunk's start to a position, and from there to its end.
  before, after = position + 1, jnp.maximum(length - 1 - position, 0)
  if sweep.is_reversed:
    before, after = after, before
  power = lambda exponent: jnp.exp(log_decay[:, None] * exponent[None])
  multiply = functools.partial(jnp.einsum, precision="highest")
  # Within the chunk the T x T form; what came before is read from the state.
  attn = multiply("BNTH,BNSH->BNTS", query, key) * weights[None]
  out = sweep.in_scale * multiply("BNTS,BNSH->BNTH", attn, value)
  read = multiply("BNTH,BNHJ->BNTJ", query, state)
  out = sweep.out_scale * (out + power(before)[None, :, :, None] * read)
  added = multiply(
      "BNTH,BNTJ->BNHJ", power(after)[None, :, :, None] * key, value
  )
  # By the chunk's own length: padding must not decay the state.
  kept = jnp.exp(log_decay * length)[None, :, None, None] * state
  state = kept + sweep.in_scale * added
  return state, out if sweep.is_out_wide else out.astype(dtype)
