"""A convolution over the cells of a grid, in the place of attention.

  c_t   = sum_{i, j} w_{i j} gelu(v_{row(t) - i, column(t) - j})
  out_t = sigmoid(q_t) (c_t + k_t)

over i = 0 ... r rows above and j = -r ... r columns aside, of the token's own
row none to its right: the half of a kernel of (2 r + 1) x (2 r + 1) cells that
comes first where a grid is read row by row. A kernel a channel, between the
products of the projections, is what CoAtNet and Astroformer have in the layers
before attention (https://arxiv.org/abs/2106.04803,
https://arxiv.org/abs/2304.05350), `grid_conv,grid_bias` as a pattern. Theirs
reads cells on all sides and opens channels by means over the image; ours is
causal, and the gate is the token's own query. What would lie outside of the
grid is 0, and a token outside of it reads itself. XLA only.

Letters: B batch, T tokens, W = r C + r values before them, R rows, C columns,
N query heads, K key and value heads, H head size.
"""

import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.systems.mixers.convolutions import newest_values
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import layer_hooks
from kernels_pallas import masks
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class GridConv:
  """A mixer.

  Attributes:
    rows: R.
    columns: C.
    first: Position of the first cell.
    reach: r.
  """

  name: ClassVar[str] = "grid_conv"
  paper: ClassVar[str] = "https://arxiv.org/abs/2304.05350"
  neutral: ClassVar[str] = ""
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
      "kernel": (None, "tensor", None)
  }

  rows: int = 8
  columns: int = 8
  first: int = 0
  reach: int = 1

  def __post_init__(self):
    require.at_least("grid_conv: rows", self.rows, 1)
    require.at_least("grid_conv: columns", self.columns, 1)
    require.at_least("grid_conv: first", self.first, 0)
    require.at_least("grid_conv: reach", self.reach, 1)

  @property
  def num_behind(self) -> int:
    """W, tokens before its own that a token reads."""
    up, aside = self._sides
    return up * self.columns + aside

  @property
  def _sides(self) -> tuple[int, int]:
    """Rows above and columns aside, as far as there are any."""
    return min(self.reach, self.rows - 1), min(self.reach, self.columns - 1)

  @property
  def places(self) -> tuple[tuple[int, int], ...]:
    """Rows i and columns j of each cell of the kernel, its own first."""
    up, aside = self._sides
    own = [(0, j) for j in range(aside + 1)]
    above = itertools.product(range(1, up + 1), range(-aside, aside + 1))
    return (*own, *above)

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns `kernel`, w [cells, N, H]."""
    shape = (len(self.places), config.num_heads, config.head_dim)
    return {"kernel": shape[0] ** -0.5 * jax.random.normal(key, shape)}

  def mix(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      mask: masks.Mask,
  ) -> Float[Array, "B T N H"]:
    """Returns the heads' outputs of whole texts; refuses other masks."""
    layer_hooks.check_causal(self.name, call, mask)
    both = newest_values.after_zeros(value, self.num_behind)
    return self.made(params, call.positions, query, key, both)

  def made(
      self,
      params: hooks.Params,
      positions: Int[Array, "B T"],
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B L K H"],
  ) -> Float[Array, "B T N H"]:
    """Returns the heads' outputs.

    Args:
      params: Of the layer.
      positions: Of the queries; each one's cells are told by it.
      query: As the layer projects them.
      key: Likewise.
      value: L = W + T, W tokens before the queries first.
    """
    length, num_groups = query.shape[1], query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, num_groups, axis=2) for x in (key, value))
    inner, found = jax.nn.gelu(value), key
    for (i, j), weight in zip(self.places, params["kernel"], strict=True):
      start = self.num_behind - i * self.columns - j
      part = inner[:, start : start + length]
      seen = self._is_cell(positions, i, j)[..., None, None]
      weight = weight.astype(part.dtype)[None, None]
      found = found + jnp.where(seen, weight * part, 0)
    return jax.nn.sigmoid(query) * found

  def _is_cell(
      self, positions: Int[Array, "B T"], i: int, j: int
  ) -> Bool[Array, "B T"]:
    """Whether i rows above each and j columns before it there is a cell."""
    if not (i or j):
      return jnp.ones_like(positions, bool)
    place = positions - self.first
    row, column = place // self.columns - i, place % self.columns - j
    inside = (place >= 0) & (place < self.rows * self.columns)
    return inside & (row >= 0) & (column >= 0) & (column < self.columns)

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> hooks.KVCache:
    """Returns the values before the first token, 0, for every capacity."""
    return newest_values.init(self, config, batch_size, dtype)
