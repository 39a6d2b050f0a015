"""Tests of the measures of a choice, against counts by hand."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from joma.inference.sparsity import sparsity_metrics as metrics

_count = jax.jit(metrics.count)


class CountTest(absltest.TestCase):

  def test_every_measure_by_hand(self):
    # Two texts of three tokens and four units; the second text's last token is
    # padding and nothing of it counts.
    chosen = np.array(
        [
            [[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1]],
            [[0, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]],
        ],
        bool,
    )
    positive = np.array(
        [
            [[1, 0, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1]],
            [[0, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]],
        ],
        bool,
    )
    mass = np.arange(1, 25, dtype=np.float32).reshape(2, 3, 4)
    counted = np.array([[1, 1, 1], [1, 1, 0]], bool)
    dense = np.ones((2, 3, 2), np.float32)
    update = dense.copy()
    update[0, 1, 0] = 3  # Off by 2, of five tokens with norms of sqrt(2).
    update[1, 2] = 100
    found = metrics.summarize(
        _count(
            *map(jnp.asarray, (chosen, positive, mass, update, dense, counted))
        )
    )
    # Chosen 2 2 2 1 2 = 9, positive 1 2 2 2 1 = 8, both 1 1 2 1 0 = 5.
    expected = {
        "recall": 5 / 8,
        "precision": 5 / 9,
        # (1 2) (5 7) (11 12) (14) (18 19), of 1 + ... + 20.
        "mass_recall": 89 / 210,
        "output_error": np.sqrt(4 / 10),
        "kept": 9 / 20,
        # Unions 2, 3 and 2 of the three positions.
        "union": 7 / 12,
        # Chosen with a token before 2 2 2; again 1 1 and 1.
        "overlap": 3 / 6,
    }
    self.assertEqual(set(found), set(expected))
    for name, value in expected.items():
      self.assertAlmostEqual(float(found[name]), value, places=6, msg=name)

  def test_sums_of_parts_are_those_of_the_whole(self):
    rng = np.random.default_rng(0)
    draw = lambda: rng.random((4, 5, 6)) < 0.4
    chosen, positive, mass = draw(), draw(), rng.random((4, 5, 6))
    update, dense = rng.random((2, 4, 5, 3))
    arrays = (chosen, positive, mass, update, dense, np.ones((4, 5), bool))
    arrays = [
        jnp.asarray(a, None if a.dtype == bool else jnp.float32) for a in arrays
    ]
    whole = _count(*arrays)
    parts = [_count(*(a[i : i + 2] for a in arrays)) for i in (0, 2)]
    for name in metrics.Sums._fields:
      if name in ("union", "steps"):  # Of a batch: other batches, other unions.
        continue
      total = sum(getattr(part, name) for part in parts)
      np.testing.assert_allclose(total, getattr(whole, name), rtol=1e-5)

  def test_the_first_counted_token_has_none_before_it(self):
    # A prompt of one token; the two after it choose the same.
    ones = jnp.ones((1, 3, 2))
    chosen = jnp.ones((1, 3, 2), bool)
    counted = jnp.array([[False, True, True]])
    found = metrics.summarize(_count(chosen, chosen, ones, ones, ones, counted))
    self.assertEqual(found["overlap"], 1)

  def test_nothing_to_divide_by_is_nan(self):
    none = jnp.zeros((1, 2, 3), bool)
    zero = jnp.zeros((1, 2, 3))
    found = metrics.summarize(
        _count(none, none, zero, zero, zero, jnp.ones((1, 2), bool))
    )
    self.assertTrue(np.isnan(found["recall"]))
    self.assertTrue(np.isnan(found["precision"]))
    self.assertEqual(found["kept"], 0)


if __name__ == "__main__":
  absltest.main()
