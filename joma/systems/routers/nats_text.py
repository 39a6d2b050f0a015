"""Whole texts through both ways of NAtS-L.

Letters: B batch, T tokens, D width, N query heads, K key and value heads, H
head size, C chunks, U tokens of a chunk.
"""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.systems import newest_inputs
from joma.systems.mixers import delta_state
from joma.systems.mixers import gdn
from joma.systems.score_rules import convolved
from joma.transformer import hooks
from joma.transformer.weighing import merged
from kernels_pallas import masks
from kernels_pallas import output
from kernels_pallas import selection


@runtime_checkable
class Routing(Protocol):
  """A system of this kind; see `nats.Nats`."""

  name: ClassVar[str]

  @property
  def chunk(self) -> int:
    """U."""
    ...

  @property
  def slots(self) -> int:
    """Chunks of keys that a cache has room for; 0 is all of a text."""
    ...

  @property
  def width(self) -> int:
    """Tokens that the convolutions read, w."""
    ...

  @property
  def epsilon(self) -> float:
    """Of the norms."""
    ...

  @property
  def rule(self) -> gdn.Gdn:
    """Of the linear way."""
    ...

  def routes(
      self, params: hooks.Params, mean: Float[Array, "B C D"]
  ) -> tuple[Bool[Array, "B C K"], Float[Array, "B C K"]]:
    """Returns which chunks are kept, and probabilities of what was chosen."""
    ...

  def finish(
      self,
      params: hooks.Params,
      x: Float[Array, "B T D"],
      query: Float[Array, "B T N H"],
      soft: Float[Array, "B T N H"],
      linear: Float[Array, "B T N H"],
  ) -> Float[Array, "B T N H"]:
    """Returns the heads' outputs."""
    ...


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


class Text(NamedTuple):
  """What texts were read as, and what they leave.

  Attributes:
    out: Of the heads [B, T, N, H].
    soft: What attention read.
    linear: What the rule read.
    vectors: Of the tokens.
    is_kept: Which chunks stay as keys, complete or not [B, C, K].
    state: Before each text's last, incomplete chunk [B, N, H, H].
    inner: After its last token.
  """

  out: Float[Array, "B T N H"]
  soft: Float[Array, "B T N H"]
  linear: Float[Array, "B T N H"]
  vectors: Vectors
  is_kept: Bool[Array, "B C K"]
  state: Float[Array, "B N H H"]
  inner: Float[Array, "B N H H"]


def vectors(
    system: Routing,
    params: hooks.Params,
    x: Float[Array, "B T D"],
    both: Mapping[str, Float[Array, "B L _ H"]],
) -> Vectors:
  """Convolves and norms.

  Args:
    system: The router.
    params: Of the layer.
    x: What it reads.
    both: Queries, keys and values by name, the w - 1 inputs before them first.
  """
  length = x.shape[1]
  made = [
      convolved.convolve(both[part], params[part], length)
      for part in newest_inputs.PARTS
  ]
  query, key, value = (jax.nn.silu(each) for each in made)
  norm = lambda x, name: normed(x, params[name], system.epsilon).astype(x.dtype)
  unit = delta_state.unit(made, query.shape[2])
  return Vectors(
      query,
      norm(query, "soft_query"),
      norm(key, "soft_key"),
      value,
      (*unit, *system.rule.rates(params, x)),
  )


def normed(
    x: Float[Array, "B T N H"], scale: Float[Array, "H"], epsilon: float
) -> Float[Array, "B T N H"]:
  """RMS norm of each head, float32."""
  wide = x.astype(jnp.float32)
  size = jnp.square(wide).mean(axis=-1, keepdims=True)
  return wide * jax.lax.rsqrt(size + epsilon) * scale[None, None, None]


def read(
    system: Routing,
    params: hooks.Params,
    call: hooks.Call,
    arrays: tuple[Array, Array, Array],
    lengths: Int[Array, "B"],
) -> Text:
  """Reads texts from their first tokens.

  Args:
    system: The router.
    params: Of the layer.
    call: Of the layer.
    arrays: Queries, keys and values as they were projected.
    lengths: Tokens of each; what follows them leaves nothing.
  """
  both = {}
  for part, x in zip(newest_inputs.PARTS, arrays, strict=True):
    before = jnp.zeros((len(x), system.width - 1, *x.shape[2:]), x.dtype)
    both[part] = jnp.concatenate([before, x], axis=1)
  found = vectors(system, params, call.x, both)
  is_kept, prob = system.routes(params, means(call.x, system.chunk))
  # 0, with the gradient of the probability of what was chosen.
  slope = prob - jax.lax.stop_gradient(prob)
  options, size = call.options, system.chunk
  soft = attend(
      found, is_kept, None if call.has_cache else slope, size, options
  )
  linear, state, inner = fold(found, is_kept, slope, lengths, size, options)
  out = system.finish(params, call.x, found.query, soft, linear)
  return Text(out, soft, linear, found, is_kept, state, inner)


def means(x: Float[Array, "B T D"], size: int) -> Float[Array, "B C D"]:
  """Means over chunks, float32; of the last one if it is complete."""
  return in_chunks(x.astype(jnp.float32), size).mean(axis=2)


def in_chunks(x: Float[Array, "B T *d"], size: int) -> Float[Array, "B C U *d"]:
  """Zeros fill the last chunk."""
  fill = [(0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)]
  x = jnp.pad(x, fill)
  return x.reshape(len(x), -1, size, *x.shape[2:])


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
    result = delta_state.rule(
        options, arrays, initial_state=state, lengths=left
    )
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
