from absl.testing import absltest
import jax.numpy as jnp
import numpy as np

from joma.systems import probes


def _maps(*rows):
  """Maps of one text, a head each."""
  return jnp.asarray(np.array(rows, np.float32)[None])


_FIRST = [[1, 0, 0], [1, 0, 0], [1, 0, 0]]
_OWN = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
_EVEN = [[1, 0, 0], [0.5, 0.5, 0], [1 / 3] * 3]


class MapsTest(absltest.TestCase):

  def test_a_text_at_a_time_is_another_rate_than_of_the_mean(self):
    """Of three texts one has .84 on the first key, two .01."""
    weights = np.zeros((3, 1, 1, 2), np.float32)
    weights[:, 0, 0, 0] = 0.84, 0.01, 0.08
    weights[..., 1] = 1 - weights[..., 0]
    weights = jnp.asarray(weights)
    np.testing.assert_allclose(probes.sinks(weights), [1 / 3], rtol=1e-6)
    np.testing.assert_array_equal(probes.sink_of_means(weights), [1])
    lower = weights.at[0].set(jnp.array([[[0.5, 0.5]]]))
    np.testing.assert_allclose(probes.sinks(lower), [1 / 3], rtol=1e-6)
    np.testing.assert_array_equal(probes.sink_of_means(lower), [0])

  def test_maps_by_hand(self):
    maps = _maps(_FIRST, _OWN, _EVEN)
    np.testing.assert_array_equal(probes.sinks(maps), [1, 1, 1])
    even = np.sqrt((1 + 0.5 + 1 / 3) / 3)
    np.testing.assert_allclose(
        probes.concentration(maps), [1, 1, even], rtol=1e-6
    )
    local = np.array(probes.local(maps))
    np.testing.assert_allclose(local[0], [1 / 3, 2 / 3, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(local[1], 1, rtol=1e-6)
    np.testing.assert_allclose(
        local[2, :2], [(1 + 0.5 + 1 / 3) / 3, (2 + 2 / 3) / 3], rtol=1e-6
    )
    # Maps of one entry a row, of which one of three is shared.
    np.testing.assert_allclose(
        probes.diversity(_maps(_FIRST, _OWN)), 2 / 3, rtol=1e-6
    )
    np.testing.assert_allclose(
        probes.diversity(_maps(_OWN, _OWN)), 0, atol=1e-6
    )
    self.assertEqual(float(probes.diversity(_maps(_OWN))), 0)

  def test_what_has_no_row_sums_is_divided_by_them(self):
    maps = _maps(_EVEN)
    found = probes.of_maps(("concentration", "local"), 5 * maps)
    np.testing.assert_allclose(
        found["concentration"], probes.concentration(maps), rtol=1e-6
    )
    nothing = probes.with_row_sums(0 * maps)
    np.testing.assert_array_equal(nothing, 0 * maps)


class SecondarySinksTest(absltest.TestCase):

  def _resid(self, cosine):
    """Token 9 is like the first from boundary 4 for 3; a rise at 2, fall at 8.

    Tokens are orthogonal otherwise.
    """
    resid = np.tile(np.eye(12)[None], (10, 1, 1))
    resid[2:8, 0] *= 50
    resid[4:7, 9] = 20 * cosine * np.eye(12)[0]
    resid[4:7, 9] += 20 * np.sqrt(1 - cosine**2) * np.eye(12)[9]
    return resid

  def test_a_planted_sink_is_found_exactly_and_a_near_miss_is_not(self):
    found = probes.secondary_sinks(self._resid(0.95))
    self.assertEqual(found, [probes.SecondarySink(9, 4, 3)])
    self.assertEqual(
        probes.secondary_sinks(self._resid(-0.95)),
        [probes.SecondarySink(9, 4, 3)],
    )
    self.assertEmpty(probes.secondary_sinks(self._resid(0.85)))

  def test_the_first_three_and_what_is_outside_do_not_count(self):
    resid = self._resid(0.0)
    resid[2:8, 2] = resid[2:8, 0]
    resid[8:, 9] = resid[8:, 0]  # After the fall.
    self.assertEmpty(probes.secondary_sinks(resid))


class UpdateRankTest(absltest.TestCase):

  def test_is_the_number_of_values_that_hold_nine_tenths(self):
    start = np.random.default_rng(0).normal(size=(5, 4))
    for values, want in (
        ((3.0, 0.9, 0, 0), 1),
        ((3.0, 1.1, 0, 0), 2),
        ((1.0, 1.0, 1.0, 1.0), 4),
        ((0.0, 0, 0, 0), 0),
    ):
      change = np.zeros((5, 4))
      change[np.arange(4), np.arange(4)] = values
      with self.subTest(values):
        self.assertEqual(probes.update_rank(start + change, start), want)


if __name__ == "__main__":
  absltest.main()
