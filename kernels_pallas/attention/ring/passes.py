"""The ways round the ring: out and lse, gradients, and what each key got.

At step s device d has the keys of device d - s, and those of the next step are
on their way to it while it computes. Partial outputs are merged by their lse;
gradients and column sums of keys travel with them, a step behind, and go home
at the end. A device holds two parts of the keys at any time.

Letters as in `ring`.
"""

from collections.abc import Callable, Iterator
import dataclasses
import types
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import masks
from kernels_pallas import output
from kernels_pallas.attention import differentiable
from kernels_pallas.attention.ring import order
from kernels_pallas.transformations import derivatives

_CarryT = TypeVar("_CarryT")


class Chunk(NamedTuple):
  """What travels: the keys of one device.

  Attributes:
    key: Any float type.
    value: As key, or None where nobody reads them.
    key_ids: Of a mask that has ids, int32 [S] or [B, S].
  """

  key: Float[Array, "B S K H"]
  value: Any
  key_ids: Array | None


class Met(NamedTuple):
  """Neighbouring keys of a chunk and what the queries see of them.

  Attributes:
    at: Their places in the chunk.
    key: A part of the chunk's.
    value: Likewise.
    where: Spans among these keys.
  """

  at: slice
  key: Float[Array, "B s K H"]
  value: Any
  where: masks.Mask


def forward(
    module: types.ModuleType,
    inputs: differentiable.Inputs,
    ring: order.Ring,
    spec: differentiable.AttentionSpec,
) -> output.AttentionOutput:
  """Out and lse; out is as wide as lse."""
  query, sink_logits = inputs.query, inputs.sink_logits
  wide = dataclasses.replace(spec, return_col_mass=False, is_out_wide=True)

  def meet(
      step: Any, chunk: Chunk, so_far: output.AttentionOutput
  ) -> output.AttentionOutput:
    for met in _parts(inputs.where, chunk, ring, step):
      given = differentiable.Inputs(query, *met[1:], None, None)
      found = _run(module, module.forward, given, wide)
      so_far = output.merge(so_far, found)
    return so_far

  start = _nothing(query, sink_logits)
  chunk = _own(inputs.key, inputs.value, inputs.where)
  return _around(ring, meet, start, chunk)


def backward(
    module: types.ModuleType,
    saved: differentiable.Saved,
    ring: order.Ring,
    spec: differentiable.AttentionSpec,
) -> differentiable.Cotangents:
  """Cotangents of query, key and value, as wide as lse."""
  dtype = saved.lse.dtype
  spec = dataclasses.replace(spec, return_col_mass=False)

  def meet(step: Any, chunk: Chunk, carry: tuple[Any, ...]) -> tuple[Any, ...]:
    d_query, d_key, d_value = carry
    # Sums for these keys lie where the keys were a step ago.
    d_key, d_value = ring.permute((d_key, d_value), 1)
    for met in _parts(saved.where, chunk, ring, step):
      given = saved._replace(key=met.key, value=met.value, where=met.where)
      more = _run(module, module.backward, given, spec)
      d_query += more[0].astype(dtype)
      d_key, d_value = (
          x.at[:, met.at].add(update.astype(dtype))
          for x, update in ((d_key, more[1]), (d_value, more[2]))
      )
    return d_query, d_key, d_value

  zeros = lambda x: jnp.zeros_like(x, dtype)
  start = zeros(saved.query), zeros(saved.key), zeros(saved.value)
  chunk = _own(saved.key, saved.value, saved.where)
  d_query, *sums = _around(ring, meet, start, chunk)
  return d_query, *ring.permute(tuple(sums), 1 - ring.num_steps)


def col_mass(
    module: types.ModuleType,
    inputs: differentiable.Inputs,
    lse: Float[Array, "B N T"],
    ring: order.Ring,
    spec: differentiable.AttentionSpec,
) -> Float[Array, "B N S"]:
  """What each key got in all, from the lse of the whole text."""
  batch, num_keys, _, _ = inputs.key.shape

  def meet(step: Any, chunk: Chunk, sums: jax.Array) -> jax.Array:
    sums = ring.permute(sums, 1)
    for met in _parts(inputs.where, chunk, ring, step):
      # No value is read.
      given = inputs._replace(
          key=met.key, value=met.key, where=met.where, sink_logits=None
      )
      call = lambda pair, spec: module.col_mass(*pair, spec)
      found = _run(module, call, (given, lse), spec)
      sums = sums.at[:, :, met.at].add(found)
    return sums

  start = jnp.zeros((batch, inputs.query.shape[2], num_keys), lse.dtype)
  chunk = _own(inputs.key, None, inputs.where)
  sums = _around(ring, meet, start, chunk)
  return ring.permute(sums, 1 - ring.num_steps)


def _around(
    ring: order.Ring,
    meet: Callable[[Any, Chunk, _CarryT], _CarryT],
    carry: _CarryT,
    chunk: Chunk,
) -> _CarryT:
  """Meets every chunk, while the one after it is on its way."""

  def body(step: Any, state: tuple[_CarryT, Chunk]) -> tuple[_CarryT, Chunk]:
    carry, chunk = state
    coming = ring.permute(chunk, 1)
    return meet(step, chunk, carry), coming

  last = ring.num_steps - 1
  carry, chunk = jax.lax.fori_loop(0, last, body, (carry, chunk))
  return meet(last, chunk, carry)


def _run(
    module: types.ModuleType,
    function: Callable[..., Any],
    given: Any,
    spec: differentiable.AttentionSpec,
) -> Any:
  call = lambda given: function(given, spec)
  return derivatives.run("attention", module, call, given, is_by_jax=False)


def _nothing(
    query: Float[Array, "B T N H"], sink_logits: Float[Array, "N"] | None
) -> output.AttentionOutput:
  """Attention to no key, but to a sink if there is one."""
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  lse = jnp.full_like(query[..., 0], -jnp.inf, dtype).swapaxes(1, 2)
  if sink_logits is not None:
    sink = sink_logits.astype(dtype)[None, :, None]
    lse = jnp.broadcast_to(sink, lse.shape)
  return output.AttentionOutput(jnp.zeros_like(query, dtype), lse)


def _own(key: jax.Array, value: Any, where: differentiable.Where) -> Chunk:
  """What a device begins with."""
  assert isinstance(where, masks.Mask)  # Of the others there are none here.
  return Chunk(key, value, where.key_ids)


def _parts(
    where: differentiable.Where, chunk: Chunk, ring: order.Ring, step: Any
) -> Iterator[Met]:
  """A chunk, or its pieces where all of its spans are more than masks have."""
  assert isinstance(where, masks.Mask)
  source = (jax.lax.axis_index(ring.axis) - step) % ring.num_devices
  pieces, num_keys = ring.pieces(source), chunk.key.shape[1]
  size = num_keys // len(pieces)
  cut = [_within(where, piece * size, size) for piece in pieces]
  if len(pieces) > 1 and where.starts.shape[-2] == 1:
    starts, stops = (
        jnp.concatenate([x[i] + n * size for n, x in enumerate(cut)], axis=-2)
        for i in range(2)
    )
    cut, size = [(starts, stops)], num_keys
  for number, (starts, stops) in enumerate(cut):
    at = slice(number * size, (number + 1) * size)
    ids = None if chunk.key_ids is None else chunk.key_ids[..., at]
    value = None if chunk.value is None else chunk.value[:, at]
    mask = masks.Mask(starts, stops, where.query_ids, ids)
    yield Met(at, chunk.key[:, at], value, mask)


def _within(where: masks.Mask, first: Any, size: int) -> tuple[Any, Any]:
  """Spans among the `size` keys from position `first` on."""
  starts, stops = (jnp.asarray(x) - first for x in (where.starts, where.stops))
  return starts.clip(0, size), stops.clip(0, size)
