from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import masks
from kernels_pallas import selection
from kernels_pallas.attention import visits

_RNG = np.random.default_rng(0)


def _lists(plan):
  """(full tiles, partial tiles) of every row."""
  table, num_full, num_valid = jax.tree.map(np.asarray, plan)
  out = {}
  for b, n, r in np.ndindex(num_full.shape):
    full, valid = num_full[b, n, r], num_valid[b, n, r]
    row = table[b, n, r].tolist()
    out[b, n, r] = (row[:full], row[full:valid])
    assert all(entry == row[max(valid - 1, 0)] for entry in row[valid:])
  return out


class VisitsTest(parameterized.TestCase):

  @parameterized.parameters(False, True)
  @pytest.mark.by_default(0)
  def test_lists_full_then_partial_tiles_in_ascending_order(self, traced):
    states = _RNG.integers(0, 3, (2, 3, 5, 7)).astype(np.int8)
    given = jnp.asarray(states) if traced else states
    for plan, view in (
        (visits.by_query(given), states),
        (visits.by_key(given), states.swapaxes(-1, -2)),
    ):
      for index, (full, partial) in _lists(plan).items():
        self.assertEqual(full, np.flatnonzero(view[index] == 2).tolist())
        self.assertEqual(partial, np.flatnonzero(view[index] == 1).tolist())

  def test_known_states_give_lists_no_wider_than_needed(self):
    states = visits.states_of(masks.causal(64), 64, 64, 8, 8)
    self.assertEqual(visits.by_query(states).table.shape, (1, 1, 8, 8))
    states = visits.states_of(masks.sliding_window(64, window=8), 64, 64, 8, 8)
    self.assertEqual(visits.by_query(states).table.shape, (1, 1, 8, 2))

  def test_rows_without_tiles_repeat_tile_0(self):
    plan = visits.by_query(np.zeros((1, 1, 2, 3), np.int8))
    np.testing.assert_array_equal(plan.table, np.zeros((1, 1, 2, 1)))
    np.testing.assert_array_equal(plan.num_valid, np.zeros((1, 1, 2)))

  def test_a_selection_meets_its_mask(self):
    # Block 0 and 2 are listed; causal forbids block 2 to the first row.
    chosen = selection.Selection(
        np.array([0, 2, 9], np.int32)[None, None, None].repeat(2, axis=2),
        np.array([[[2, 2]]], np.int32),
        masks.causal(16, 24, offset=8),
        8,
        8,
    )
    states = visits.states_of(chosen, 16, 24, 8, 8)
    self.assertIsInstance(states, np.ndarray)
    np.testing.assert_array_equal(states[0, 0], [[2, 0, 0], [2, 0, 1]])
    self.assertEqual(visits.width_of(chosen), 3)


if __name__ == "__main__":
  absltest.main()
