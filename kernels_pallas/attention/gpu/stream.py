"""Streams tiles through a ring of shared memory, in the order of `Visits`.

The warpgroup that orders copies runs `produce`, each of the others `consume`,
over the same lists. A channel is what arrives and is given back together; the
kernel waits for it as late as it can and gives it back as early as it can.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import visits as visits_lib
from kernels_pallas.hardware import gpu_layout
from kernels_pallas.hardware import types as hw_types

plgpu = gpu_layout.plgpu


class Channel(NamedTuple):
  """A ring of buffers.

  Attributes:
    buffers: References in shared memory, [num_stages, ...] each.
    ready: Barriers, one a stage, on which the copies arrive.
    free: Barriers, one a stage, on which the consumers arrive.
  """

  buffers: Sequence[Any]
  ready: hw_types.Barrier
  free: hw_types.Barrier


class Walk(NamedTuple):
  """One list of tiles.

  Attributes:
    tile: Says which tile the i-th is.
    num_full: The first so many need no mask.
    num_valid: Length of the list.
  """

  tile: Callable[[Any], Any]
  num_full: hw_types.Count
  num_valid: hw_types.Count


class Kinds(NamedTuple):
  """Which tiles there can be, known while tracing."""

  has_full: bool
  has_partial: bool


def barriers(
    num_stages: int, num_buffers: int, num_consumers: int
) -> tuple[hw_types.Buffer, hw_types.Buffer]:
  """The barriers of a channel, `ready` and `free`."""
  return (
      plgpu.Barrier(num_arrivals=num_buffers, num_barriers=num_stages),
      plgpu.Barrier(num_arrivals=num_consumers, num_barriers=num_stages),
  )


def kinds_of(visits: visits_lib.Visits) -> Kinds:
  """All kinds, unless the lists are known while tracing."""
  num_full, num_valid = visits.num_full, visits.num_valid
  if not (
      isinstance(num_full, np.ndarray) and isinstance(num_valid, np.ndarray)
  ):
    return Kinds(True, True)
  return Kinds(bool((num_full > 0).any()), bool((num_valid > num_full).any()))


def walk_of(
    refs: Mapping[str, Any],
    batch: hw_types.Index,
    head: hw_types.Index,
    tile: hw_types.Index,
) -> Walk:
  """The list of a tile of the side that stays."""
  table, num_full, num_valid = (
      refs[name] for name in ("table", "num_full", "num_valid")
  )
  batch = batch if table.shape[0] > 1 else 0
  head = head if table.shape[1] > 1 else 0
  return Walk(
      lambda i: table[batch, head, tile, i],
      num_full[batch, head, tile],
      num_valid[batch, head, tile],
  )


def produce(
    walk: Walk,
    channels: Sequence[Channel],
    copies: Sequence[Callable[[Any, Any, Any], None]],
    first_step: hw_types.Index = 0,
) -> None:
  """Orders the copies of all tiles of a list.

  Args:
    walk: The list.
    channels: Filled in this order.
    copies: For each channel, orders its copies of a tile, given the tile, the
      slot and the barrier to arrive on.
    first_step: Tiles that went through the ring before.
  """
  num_stages = channels[0].buffers[0].shape[0]

  @pl.loop(0, walk.num_valid)
  def _(i: jax.Array):
    step = first_step + i
    slot, tile = lax.rem(step, num_stages), walk.tile(i)
    for channel, copy in zip(channels, copies, strict=True):
      # A slot is filled anew when all consumers have given it back; the first
      # round finds the slots free.
      wait = lambda free=channel.free: plgpu.barrier_wait(free.at[slot])
      pl.when(step >= num_stages)(wait)
      copy(tile, slot, channel.ready.at[slot])


def copy_keys(
    ref: hw_types.Ref,
    batch: hw_types.Index,
    head: hw_types.Index,
    channel: Channel,
    tile: hw_types.Index,
    slot: hw_types.Index,
    ready: hw_types.Barrier,
) -> None:
  """Orders the copy of one tile of [B, S, K, H] into a channel."""
  buffer = channel.buffers[0].at[slot]
  rows = pl.ds(tile * buffer.shape[0], buffer.shape[0])
  plgpu.copy_gmem_to_smem(ref.at[batch, rows, head], buffer, ready)


def drain(channels: Sequence[Channel], num_steps: hw_types.Count) -> None:
  """Waits until all tiles are given back: no phase of a barrier is missed."""
  num_stages = channels[0].buffers[0].shape[0]

  @pl.loop(jnp.maximum(num_steps - num_stages, 0), num_steps)
  def _(step: jax.Array):
    for channel in channels:
      plgpu.barrier_wait(channel.free.at[lax.rem(step, num_stages)])


def consume(
    walk: Walk,
    num_stages: int,
    kinds: Kinds,
    visit: Callable[..., Any],
    carry: Any,
    first_step: hw_types.Index = 0,
) -> Any:
  """Visits all tiles of a list: visit(tile, slot, carry, is_partial=...)."""

  def loop(
      start: hw_types.Index, stop: hw_types.Index, is_partial: bool, carry
  ):
    def step(i: hw_types.Index, carry):
      slot = lax.rem(first_step + i, num_stages)
      return visit(lambda: walk.tile(i), slot, carry, is_partial=is_partial)

    return lax.fori_loop(start, stop, step, carry)

  # Two loops: tiles without a mask carry no code for one.
  if kinds.has_full:
    carry = loop(0, walk.num_full, False, carry)
  if kinds.has_partial:
    carry = loop(walk.num_full, walk.num_valid, True, carry)
  return carry
