"""Convolutions over a grid: the equation, and cells that are no neighbours."""

import math

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.systems.mixers.convolutions import grid_conv
from joma.transformer import attention
from joma.transformer import full_cache
from kernels_pallas import masks
from scansnap_jax.experiment import errors
from tests.joma.systems import one_layer

_ROWS, _COLUMNS, _FIRST = 3, 4, 2
_LENGTH = _FIRST + _ROWS * _COLUMNS + 2
_ENTRY = f"grid_conv:rows={_ROWS}:columns={_COLUMNS}:first={_FIRST}"
_gelu = np.vectorize(
    lambda x: x
    / 2
    * (1 + math.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
)


def _by_hand(params, x, reach):
  """Heads' outputs of one text [T, D], cell by cell, in float64."""
  project = lambda name: np.einsum(
      "TD,DNH->TNH", np.float64(x), np.float64(params[name]["kernel"])
  )
  query, key, value = (project(name) for name in ("query", "key", "value"))
  key, inner = (np.repeat(rows, 2, axis=1) for rows in (key, _gelu(value)))
  kernel = np.float64(params["grid_conv"]["kernel"])
  # Own row from here to the left, then rows above from right to left.
  near = [(0, -j) for j in range(reach + 1)]
  near += [
      (-i, -j) for i in range(1, reach + 1) for j in range(-reach, reach + 1)
  ]
  made = np.zeros_like(inner)
  for t in range(len(x)):
    row, column = divmod(t - _FIRST, _COLUMNS)
    is_cell = 0 <= row < _ROWS
    for weight, (down, right) in zip(kernel, near, strict=True):
      if (down, right) == (0, 0):
        made[t] += weight * inner[t]
      elif is_cell:
        y, z = row + down, column + right
        if 0 <= y < _ROWS and 0 <= z < _COLUMNS:
          made[t] += weight * inner[_FIRST + y * _COLUMNS + z]
  return (made + key) / (1 + np.exp(-query))


class GridConvTest(parameterized.TestCase):

  @parameterized.parameters(1, 2)
  @pytest.mark.by_default(0)
  def test_one_pass_is_the_equation(self, reach):
    entry = f"{_ENTRY}:reach={reach}"
    config, params, x = one_layer.draw(entry, length=_LENGTH)
    got = one_layer.head_out(config, params, x)
    np.testing.assert_allclose(got[1], _by_hand(params, x[1], reach), atol=1e-5)

  @pytest.mark.slow
  def test_a_cell_reads_its_neighbours_alone(self):
    config, params, x = one_layer.draw(_ENTRY, length=_LENGTH)
    at = lambda row, column: _FIRST + row * _COLUMNS + column
    moved = np.abs(
        one_layer.head_out(config, params, x.at[:, at(1, 3)].add(1.0))
        - one_layer.head_out(config, params, x)
    ).max(axis=(0, 2, 3))
    # The end of a row: the next one's start is no neighbour.
    want = [at(1, 3), at(2, 2), at(2, 3)]
    np.testing.assert_array_equal(np.flatnonzero(moved), want)

  @pytest.mark.slow
  def test_padding_is_not_among_the_newest(self):
    config, params, x = one_layer.draw(_ENTRY, length=_LENGTH)
    cache = full_cache.init(config, 2, _LENGTH)[0]
    module = attention.Attention(config, 0, implementation="reference")
    steps = jnp.arange(_LENGTH)[None]
    positions = jnp.where(steps < jnp.array([[9], [_LENGTH]]), steps, -1)
    run = jax.jit(
        lambda x, positions, cache: module.apply(
            {"params": params}, x, positions, masks.causal(_LENGTH), cache
        )[1]
    )
    kept = run(x, positions, cache).values
    value = np.einsum("BTD,DNH->BTNH", x, params["value"]["kernel"])
    for row, length in enumerate((9, _LENGTH)):
      want = value[row, length - 5 : length]
      np.testing.assert_allclose(kept[row], want, atol=1e-5)

  def test_there_are_no_weights_for_cells_that_are_not_there(self):
    one_row = grid_conv.GridConv(rows=1, columns=20, reach=3)
    self.assertEqual(one_row.places, ((0, 0), (0, 1), (0, 2), (0, 3)))
    self.assertEqual(one_row.num_behind, 3)
    narrow = grid_conv.GridConv(rows=9, columns=1, reach=2)
    self.assertEqual(narrow.places, ((0, 0), (1, 0), (2, 0)))
    self.assertEqual(narrow.num_behind, 2)
    square = grid_conv.GridConv(rows=6, columns=6)
    self.assertEqual(square.num_behind, 7)
    self.assertLen(square.places, 5)

  def test_what_cannot_be_is_refused(self):
    for option in ("rows=0", "columns=0", "first=-1", "reach=0"):
      name = option.partition("=")[0]
      with self.assertRaisesRegex(errors.UserError, f"{name} must be at least"):
        one_layer.draw(f"grid_conv:{option}")
    config, params, x = one_layer.draw(_ENTRY, length=_LENGTH)
    with self.assertRaisesRegex(errors.UserError, "no mask but the causal"):
      one_layer.run(
          config, params, x, mask=masks.document(np.zeros(_LENGTH, int))
      )


if __name__ == "__main__":
  absltest.main()
