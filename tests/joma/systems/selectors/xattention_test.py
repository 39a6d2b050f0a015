"""XAttention: masses and blocks by hand; its twin that sums along diagonals."""

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np

from joma.systems.selectors import xattention
from scansnap_jax.experiment import errors
from tests.joma.systems.selectors import selected

_SIZE, _STRIDE, _SCALE = 8, 4, 8**-0.5


def _mass(query, key, row, along=lambda i: _STRIDE - 1 - i):
  """Mass of each block of keys in one block of queries, by plain loops."""
  groups, length = _SIZE // _STRIDE, -(-len(query) // _SIZE) * _SIZE
  fill = lambda x: np.pad(x, ((0, length - len(x)), (0, 0)))
  query, key = fill(query), fill(key)
  found = np.zeros(row + 1)
  for r in range(row * groups, (row + 1) * groups):
    logits = np.array([
        sum(
            query[r * _STRIDE + along(i)] @ key[c * _STRIDE + i]
            for i in range(_STRIDE)
        )
        for c in range(r + 1)
    ])
    weights = np.exp(logits * _SCALE / _STRIDE)
    weights /= weights.sum() * groups
    for c, weight in enumerate(weights):
      found[c // groups] += weight
  return found


def _fewest(mass, threshold):
  """Own block and the first, then the heaviest."""
  own = len(mass) - 1
  order = sorted(
      range(own + 1), key=lambda c: -mass[c] - (c == 0) - 2 * (c == own)
  )
  kept, held = set(), 0.0
  for c in order:
    if held < threshold or c in (0, own):
      kept.add(c)
    held += mass[c]
  return kept


class XAttentionTest(parameterized.TestCase):

  def test_the_fewest_blocks_that_hold_the_mass_are_read(self):
    """The twin's groups are not reversed: it sums along the diagonal."""
    query, key, _ = selected.draw(length=70)
    query = 4 * query
    system = xattention.XAttention(0.5, _STRIDE, _SIZE)
    found = selected.select(system, query, key)
    arrays, differs = np.asarray(query), 0
    for head in range(4):
      for row in range(9):
        rows = (arrays[1, :, head], np.asarray(key)[1, :, head // 2], row)
        blocks = selected.listed(found, 1, head, row)
        self.assertLen(set(blocks), len(blocks))
        self.assertEqual(set(blocks), _fewest(_mass(*rows), 0.5))
        twin = _mass(*rows, along=lambda i: i)
        differs += set(blocks) != _fewest(twin, 0.5)
    self.assertGreater(differs, 5)

  def test_a_planted_antidiagonal_is_found(self):
    """One key of block 2 is like one query of block 7, and no other is."""
    query, key = jnp.zeros((1, 64, 1, 8)), jnp.zeros((1, 64, 1, 8))
    query = query.at[0, 7 * _SIZE + 1].set(4.0)
    key = key.at[0, 2 * _SIZE + 2].set(4.0)
    system = xattention.XAttention(0.4, _STRIDE, _SIZE, k=3)
    found = selected.select(system, query, key)
    self.assertEqual(set(selected.listed(found, 0, 0, 7)), {0, 2, 7})

  def test_says_what_would_be_right(self):
    with self.assertRaisesRegex(errors.UserError, "threshold=1.5 must lie in"):
      xattention.XAttention(threshold=1.5)
    with self.assertRaisesRegex(errors.UserError, "multiple of stride=16"):
      xattention.XAttention(block=24)


if __name__ == "__main__":
  absltest.main()
