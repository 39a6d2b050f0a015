"""What the GPU kernels of attention are given, and know while traced."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas import masks
from kernels_pallas.attention import visits as visits_lib
from kernels_pallas.attention.gpu import stream
from kernels_pallas.hardware import gpu_layout
from kernels_pallas.hardware import gpu_math
from kernels_pallas.hardware import gpu_registers
from kernels_pallas.hardware import types as hw_types


class Limits(NamedTuple):
  """What tiles must suit.

  Attributes:
    head_dim: H, 64 or 128.
    has_ids: Whether the mask has ids, which take registers.
    most_q: The query tile must divide it.
    most_kv: The key tile must divide it.
  """

  head_dim: int
  has_ids: bool = False
  most_q: int = 128
  most_kv: int = 128


class Task(NamedTuple):
  """An attention over listed tiles.

  Attributes:
    mask: What holds in the tiles that `visits` calls partial.
    visits: Tiles that stream, for each tile that stays, of `config`'s sizes.
    scale: Factor of the logits.
    soft_cap: c in c tanh(logits / c), None for none.
    config: Tile sizes.
  """

  mask: masks.Mask | None
  visits: visits_lib.Visits
  scale: float
  soft_cap: float | None
  config: gpu_layout.TileConfig

  @property
  def kinds(self) -> stream.Kinds:
    """Which tiles there can be."""
    return stream.kinds_of(self.visits)

  def inputs_of(self, query: jax.Array, key: jax.Array) -> dict[str, Any]:
    """Query, key, spans and lists by name, as every kernel reads them."""
    # Spans and lists depend on the kernel's own tiles.
    sizes = query.shape[1], key.shape[1]
    spans = gpu_layout.spans_of(self.mask, *sizes, self.config)
    lists = spans._asdict() | self.visits._asdict()
    return {"query": query, "key": key} | lists

  def logits_of(self, products: jax.Array) -> jax.Array:
    """Logits in units of log 2."""
    return gpu_math.log2_logits(products, self.scale, self.soft_cap)

  def slopes_of(self, weights: jax.Array, logits: jax.Array) -> jax.Array:
    """The weights times the derivative of the soft cap."""
    return gpu_math.with_cap_slope(weights, logits, self.soft_cap)

  def allowed(
      self,
      refs: Mapping[str, Any],
      batch: hw_types.Index,
      first: hw_types.Index,
      query_axis: int,
  ) -> Callable[[hw_types.Index], jax.Array]:
    """The mask of a warpgroup's rows and of a streamed tile, by its number.

    Args:
      refs: Of the kernel.
      batch: Number of the sequence.
      first: Of the rows: of queries with a query_axis of 0, else of keys.
      query_axis: Along which queries lie.
    """
    config = self.config
    size = (config.block_kv, config.block_q)[query_axis]

    def at(tile: hw_types.Index) -> jax.Array:
      query, key = first, tile * size
      if query_axis:
        query, key = key, query
      shape = gpu_layout.ROWS, size
      return gpu_registers.allowed_tile(
          refs, batch, query, key, shape, query_axis
      )

    return at


class Place(NamedTuple):
  """Where a warpgroup is, of a kernel whose query tiles stay.

  Attributes:
    batch: Number of the sequence.
    head: Of the query head.
    kv_head: Of the head whose keys it reads.
    group: Of the warpgroup; the last one orders copies.
    num_consumers: The others.
    walk: Tiles of keys.
    first_query: Of the warpgroup's rows.
  """

  batch: hw_types.Index
  head: hw_types.Index
  kv_head: hw_types.Index
  group: hw_types.Index
  num_consumers: int
  walk: stream.Walk
  first_query: hw_types.Index


def produce_keys(
    place: Place,
    refs: Mapping[str, Any],
    channels: Mapping[str, stream.Channel],
) -> None:
  """Orders the copies of a list's keys and values, into channels by name."""
  gpu_registers.lend_registers(place.num_consumers)
  copies = [
      functools.partial(
          stream.copy_keys, refs[name], place.batch, place.kv_head, channel
      )
      for name, channel in channels.items()
  ]
  rings = tuple(channels.values())
  stream.produce(place.walk, rings, copies)
  stream.drain(rings, place.walk.num_valid)


def place_of(task: Task, refs: Mapping[str, Any]) -> Place:
  """Of this warpgroup, in a grid of batch, head and tile of queries."""
  batch, head = lax.axis_index("batch"), lax.axis_index("head")
  # The longest lists of a causal mask come last: start with them.
  tile = lax.axis_size("tile") - 1 - lax.axis_index("tile")
  group, block_q = lax.axis_index("warpgroup"), task.config.block_q
  num_groups = refs["query"].shape[2] // refs["key"].shape[2]
  return Place(
      batch,
      head,
      lax.div(head, num_groups),
      group,
      block_q // gpu_layout.ROWS,
      stream.walk_of(refs, batch, head, tile),
      tile * block_q + group * gpu_layout.ROWS,
  )


class Gradient(NamedTuple):
  """What both backward kernels read.

  Attributes:
    query: bfloat16 or float16; H is 64 or 128.
    key: K divides N.
    value: As key.
    d_out: Cotangent of out, of the query's type.
    lse: float32.
    delta: float32, rowsum(d_out out) - d_lse.
  """

  query: Float[Array, "B T N H"]
  key: Float[Array, "B S K H"]
  value: Float[Array, "B S K H"]
  d_out: Float[Array, "B T N H"]
  lse: Float[Array, "B N T"]
  delta: Float[Array, "B N T"]

  def inputs_of(self, task: Task) -> dict[str, Any]:
    """All of it by name; padding has no weight and no delta."""
    block_q = task.config.block_q
    return task.inputs_of(self.query, self.key) | {
        "value": self.value,
        "d_out": self.d_out,
        "lse": gpu_layout.log2_lse(self.lse, block_q),
        "delta": gpu_layout.pad_rows(self.delta, block_q, 0.0),
    }
