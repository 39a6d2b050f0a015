"""Linear attention over packed documents, and over rows of several lengths.

`packed` runs by XLA, chunk by chunk as `xla` does, with two numbers a position:
its document, and how many positions that count came up to it, by which the
state fades. Differentiated by jax, which computes chunks anew: memory O(T).

`padded` is for rows without documents, on every implementation: rows are rolled
so that padding comes first, where there is nothing that could fade yet, and
what the first state gives is added apart.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.linear_attention import output
from kernels_pallas.linear_attention import sweep as sweep_lib

# Documents and counts of a chunk's positions, [B, chunk] each.
Marks = tuple[Int[Array, "B C"], Int[Array, "B C"]]


def packed(
    operands: sweep_lib.Operands,
    segment_starts: Bool[Array, "B T"],
    lengths: Int[Array, "B"] | None,
    scale: float,
    chunk: int,
) -> output.LinearAttentionOutput:
  """Attends within documents; the first state is that of the first one.

  Args:
    operands: Arrays, and where the sequence begins.
    segment_starts: Where a document begins, and sees nothing of before.
    lengths: Positions of each sequence that count; None is all.
    scale: Of the products.
    chunk: Positions that are computed together.
  """
  query, key, value, log_decay, state = operands
  batch, length, num_heads, _ = query.shape
  chunk = min(chunk, length)
  steps = jnp.arange(length)[None]
  lengths = jnp.full((batch,), length) if lengths is None else lengths
  is_in = steps < lengths[:, None]
  key = jnp.where(is_in[..., None, None], key, 0)
  document = jnp.cumsum(segment_starts & is_in, axis=1)
  count = jnp.minimum(steps + 1, lengths[:, None])
  cut = functools.partial(_cut, chunk=chunk)
  chunks = tuple(cut(x) for x in (query, key, value, document, count))
  visit = jax.checkpoint(functools.partial(_visit, log_decay, num_heads))
  first = (state, jnp.zeros((batch,), document.dtype), jnp.zeros_like(lengths))
  (state, _, _), out = jax.lax.scan(visit, first, chunks)
  out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])[:, :length]
  out = jnp.where(is_in[..., None, None], scale * out, 0).astype(query.dtype)
  return output.LinearAttentionOutput(out, state)


def _cut(x: jax.Array, chunk: int) -> jax.Array:
  """[B, T, ...] to [chunks, B, chunk, ...]; more of the last at the end."""
  fill = -x.shape[1] % chunk
  if jnp.issubdtype(x.dtype, jnp.floating):
    x = jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2))
  else:
    x = jnp.pad(x, ((0, 0), (0, fill)), mode="edge")
  # A symbolic batch has no length.
  shape = (x.shape[0], x.shape[1] // chunk, chunk, *x.shape[2:])
  return jnp.moveaxis(x.reshape(shape), 1, 0)


def _visit(
    log_decay: Float[Array, "N"],
    num_heads: int,
    before: tuple[jax.Array, jax.Array, jax.Array],
    chunk: tuple[jax.Array, ...],
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
  """Reads the state of a chunk's start, and makes that of its end."""
  state, document, count = before
  *arrays, own, at = chunk
  query, key, value = (
      jnp.repeat(x.astype(state.dtype), num_heads // x.shape[2], axis=2)
      for x in arrays
  )
  multiply = functools.partial(jnp.einsum, precision="highest")
  fading = functools.partial(_left, log_decay)
  step = jnp.arange(own.shape[1])
  same = own[:, :, None] == own[:, None]
  same &= (step[:, None] >= step[None])[None]
  weights = fading(at[:, :, None] - at[:, None]) * same[..., None]
  attn = multiply("BTNH,BSNH->BTSN", query, key) * weights
  out = multiply("BTSN,BSNJ->BTNJ", attn, value)
  # The state is of one document: others neither read nor keep it.
  reads = fading(at - count[:, None]) * (own == document[:, None])[..., None]
  out += reads[..., None] * multiply("BTNH,BNHJ->BTNJ", query, state)
  last, end = own[:, -1], at[:, -1]
  left = fading(end[:, None] - at) * (own == last[:, None])[..., None]
  kept = fading(end - count) * (last == document)[:, None]
  state = kept[..., None, None] * state
  state += multiply("BTNH,BTNJ->BNHJ", left[..., None] * key, value)
  return (state, last, end), out


def padded(
    attend: Callable[..., output.LinearAttentionOutput],
    operands: sweep_lib.Operands,
    lengths: Int[Array, "B"],
    scale: float,
) -> output.LinearAttentionOutput:
  """Attends to the first positions of each sequence.

  Args:
    attend: Of query, key, value and a state of zeros.
    operands: Arrays, and where the sequences begin.
    lengths: Positions of each that count.
    scale: Of the products.
  """
  query, key, value, log_decay, state = operands
  steps = jnp.arange(query.shape[1])[None]
  is_in = (steps < lengths[:, None])[..., None, None]
  roll = jax.vmap(lambda x, by: jnp.roll(x, by, axis=0))
  by = query.shape[1] - lengths
  rolled = (roll(jnp.where(is_in, x, 0), by) for x in (query, key, value))
  result = attend(*rolled, jnp.zeros_like(state))
  assert result.state is not None  # Implementations return it always.
  # A query after n positions finds decay^n of what was there before.
  count = jnp.minimum(steps + 1, lengths[:, None])
  left = functools.partial(_left, log_decay)
  read = jnp.einsum("BTNH,BNHJ->BTNJ", query.astype(state.dtype), state)
  before = scale * left(count)[..., None] * read
  out = roll(result.out, -by) + before.astype(result.out.dtype)
  rest = left(lengths)[..., None, None] * state
  return output.LinearAttentionOutput(
      jnp.where(is_in, out, 0), result.state + rest
  )


def _left(
    log_decay: Float[Array, "N"], steps: Int[Array, "*b"]
) -> Float[Array, "*b N"]:
  """What is left after so many steps, at least 0 of them."""
  steps = jnp.maximum(steps, 0).astype(log_decay.dtype)
  return jnp.exp(jnp.einsum("...,N->...N", steps, log_decay))
