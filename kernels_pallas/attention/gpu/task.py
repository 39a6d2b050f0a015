"""What the GPU kernels of attention are given, and know while traced."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from kernels_pallas import masks
from kernels_pallas.attention import visits as visits_lib
from kernels_pallas.attention.gpu import stream
from kernels_pallas.hardware import gpu_layout
from kernels_pallas.hardware import gpu_math


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
