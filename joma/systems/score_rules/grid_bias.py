"""Attention over a grid that knows distances by row and by column.

  logits_ts = scale q_t k_s + b_{row(t) - row(s), column(t) - column(s)}

A grid's cells are tokens, row by row; b [2 R - 1, 2 C - 1, N] is learned, one
number a distance and head, the relative bias of two axes of CoAtNet and
Astroformer (https://arxiv.org/abs/2106.04803, https://arxiv.org/abs/2304.05350).
Tokens before and behind the grid, as of a text or a [REG] token, are at no
distance: their bias is 0. One row is a bias by distance on the flattened grid,
to which the end of a row is as near to the next one's start as its neighbour.
XLA only.

Letters: B batch, T queries, S keys, R rows, C columns, N query heads, H head
size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.transformer import config as configs
from joma.transformer import hooks
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class GridBias:
  """A score rule.

  Attributes:
    rows: R.
    columns: C.
    first: Position of the first cell.
    start: Standard deviation of b before training.
  """

  name: ClassVar[str] = "grid_bias"
  paper: ClassVar[str] = "https://arxiv.org/abs/2304.05350"
  neutral: ClassVar[str] = "grid_bias:start=0"
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
      "bias": (None, None, "tensor")
  }

  rows: int = 8
  columns: int = 8
  first: int = 0
  start: float = 0.02

  def __post_init__(self):
    require.at_least("grid_bias: rows", self.rows, 1)
    require.at_least("grid_bias: columns", self.columns, 1)
    require.at_least("grid_bias: first", self.first, 0)

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns `bias`, b."""
    shape = (2 * self.rows - 1, 2 * self.columns - 1, config.num_heads)
    return {"bias": self.start * jax.random.normal(key, shape)}

  def weights(self, params: hooks.Params, call: hooks.Call) -> hooks.WeightRule:
    """Softmax of logits with the bias of the two distances."""

    def bias(
        query: Float[Array, "B T N H"],
        places: Int[Array, "B T"],
        key_places: Int[Array, "#B S"],
    ) -> Float[Array, "B N T S"]:
      one, two = self._cells(places), self._cells(key_places)
      apart = [
          x[:, :, None] - y[:, None] for x, y in zip(one, two, strict=True)
      ]
      # Cells outside are clipped to where nothing is read of them.
      row = jnp.clip(apart[0] + self.rows - 1, 0, 2 * self.rows - 2)
      column = apart[1] + self.columns - 1
      found = params["bias"][row, column]
      inside = self._inside(places)[:, :, None]
      inside &= self._inside(key_places)[:, None]
      found = jnp.where(inside[..., None], found, 0)
      return found.transpose(0, 3, 1, 2).astype(jnp.float32)

    return hooks.WeightRule(name=self.name, bias=bias)

  def _cells(self, places: Int[Array, "B T"]) -> tuple[Array, Array]:
    """Row and column of each position, as if the grid went on."""
    place = places - self.first
    return place // self.columns, place % self.columns

  def _inside(self, places: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    last = self.first + self.rows * self.columns
    return (places >= self.first) & (places < last)
