"""The two ways of NAtS-L: attention to chunks that stay, the rule over others.

Letters: B batch, T tokens, N query heads, K key and value heads, H head size, C
chunks, U tokens of a chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.systems.mixers import delta_rule
from joma.transformer import hooks
from joma.transformer.weighing import merged
from kernels_pallas import masks
from kernels_pallas import output
from kernels_pallas import selection


class Vectors(NamedTuple):
  """What both ways read of tokens.

  Attributes:
    query: After convolution and silu [B, T, N, H].
    soft_query: Normed.
    soft_key: Normed [B, T, K, H].
    value: Of both [B, T, K, H].
    linear: Arguments of the rule: unit queries and keys, values, all of N
      heads, logarithms of decays and beta [B, T, N].
  """

  query: Float[Array, "B T N H"]
  soft_query: Float[Array, "B T N H"]
  soft_key: Float[Array, "B T K H"]
  value: Float[Array, "B T K H"]
  linear: tuple[Array, ...]


def attend(
    found: Vectors,
    is_kept: Bool[Array, "B C K"],
    slope: Float[Array, "B C K"] | None,
    size: int,
    options: hooks.AttentionOptions,
) -> Float[Array, "B T N H"]:
  """Attends to kept chunks, and to a query's own up to itself.

  Args:
    found: Vectors of the tokens.
    is_kept: Of each chunk.
    slope: Added to the logits of a kept chunk's keys: 0, with a gradient; None
      where none is wanted.
    size: U.
    options: Of the layer.
  """
  length, num_chunks = found.query.shape[1], is_kept.shape[1]
  arrays = (found.soft_query, found.soft_key, found.value)
  query, key, value = (in_chunks(x, size) for x in arrays)
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  whole = lambda x: x.reshape(len(x), -1, *x.shape[3:])
  own = merged.attend(
      flat(query),
      flat(key),
      flat(value),
      masks.causal(size),
      options,
      return_lse=True,
  )
  assert own.lse is not None  # Asked for.
  batch, heads = len(query), query.shape[3]
  lse = own.lse.reshape(batch, num_chunks, heads, size)
  lse = jnp.moveaxis(lse, 2, 1).reshape(batch, heads, -1)
  own = output.AttentionOutput(whole(own.out.reshape(query.shape)), lse)
  if slope is not None:
    # One more channel, in which queries are 1 after the scale.
    ones = jnp.full_like(query[..., :1], 1 / options.scale)
    query = jnp.concatenate([query, ones], axis=-1)
    added = jnp.broadcast_to(slope[:, :, None, :, None], (*key.shape[:-1], 1))
    key = jnp.concatenate([key, added.astype(key.dtype)], axis=-1)
    value = jnp.pad(value, ((0, 0),) * 4 + ((0, 1),))
  where = kept_before(is_kept, size)
  past = merged.attend(
      whole(query), whole(key), whole(value), where, options, return_lse=True
  )
  past = past._replace(out=past.out[..., : own.out.shape[-1]])
  return output.merge(own, past).out[:, :length]


def kept_before(
    is_kept: Bool[Array, "B C K"], size: int
) -> selection.Selection:
  """Blocks of each chunk of queries: the kept chunks before it."""
  place = jnp.arange(is_kept.shape[1])
  is_before = (place[None] < place[:, None])[None, None]
  is_read = jnp.moveaxis(is_kept, 1, 2)[:, :, None] & is_before
  # Those that are read first, in their order.
  table = jnp.argsort(~is_read, axis=-1, stable=True).astype(jnp.int32)
  count = is_read.sum(axis=-1).astype(jnp.int32)
  return selection.Selection(table, count, None, size, size)


def fold(
    found: Vectors,
    is_kept: Bool[Array, "B C K"],
    slope: Float[Array, "B C K"],
    lengths: Int[Array, "B"],
    size: int,
    options: hooks.AttentionOptions,
) -> tuple[Float[Array, "B T N H"], Array, Array]:
  """Runs the rule, a chunk at a time; the state takes in what is not kept.

  Args:
    found: Vectors of the tokens.
    is_kept: Of each chunk.
    slope: 0, with the gradient of the probability of what was chosen.
    lengths: Tokens of each text.
    size: U.
    options: Of the layer.

  Returns:
    What the rule reads, the state before each text's incomplete chunk, and the
    state after its last token.
  """
  batch, length, heads, width = found.query.shape
  num_chunks = is_kept.shape[1]
  first = lambda x: jnp.moveaxis(x, 1, 0)
  arrays = tuple(first(in_chunks(x, size)) for x in found.linear)
  # 1 where a chunk is folded in, with its gradient; 0 without where it is kept.
  taken = jnp.where(is_kept, 0.0, 1.0 + slope)
  taken = first(jnp.repeat(taken, heads // is_kept.shape[2], axis=2))

  def one(
      carry: tuple[Array, Array], given: tuple[Array, tuple, Array]
  ) -> tuple[tuple[Array, Array], Array]:
    (state, inner), (number, arrays, taken) = carry, given
    left = jnp.clip(lengths - number * size, 0, size)
    result = delta_rule.rule(options, arrays, initial_state=state, lengths=left)
    faded = jnp.exp(arrays[3].sum(axis=1))[..., None, None] * state
    after = faded + taken[..., None, None] * (result.state - faded)
    of_rows = lambda which: which[:, None, None, None]
    is_own = of_rows(lengths // size == number)
    return (
        jnp.where(of_rows(left == size), after, state),
        jnp.where(is_own, result.state, inner),
    ), result.out

  empty = jnp.zeros((batch, heads, width, width))
  numbers = jnp.arange(num_chunks)
  (state, inner), outs = jax.lax.scan(
      one, (empty, empty), (numbers, arrays, taken)
  )
  is_whole = (lengths % size == 0)[:, None, None, None]
  out = jnp.moveaxis(outs, 0, 1).reshape(batch, -1, heads, width)
  return out[:, :length], state, jnp.where(is_whole, state, inner)


def in_chunks(x: Float[Array, "B T *d"], size: int) -> Float[Array, "B C U *d"]:
  """Zeros fill the last chunk."""
  fill = [(0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)]
  x = jnp.pad(x, fill)
  return x.reshape(len(x), -1, size, *x.shape[2:])
