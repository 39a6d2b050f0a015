from absl.testing import absltest
import jax.numpy as jnp
import numpy as np

from joma.systems.probes import maps as maps_lib


def _maps(*rows):
  """Maps of one text, a head each."""
  return jnp.asarray(np.array(rows, np.float32)[None])


_FIRST = [[1, 0, 0], [1, 0, 0], [1, 0, 0]]
_OWN = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
_EVEN = [[1, 0, 0], [0.5, 0.5, 0], [1 / 3] * 3]


def _probe(name, weights):
  return np.asarray(maps_lib.of_maps((name,), weights, normalize=False)[name])


class MapsTest(absltest.TestCase):

  def test_a_text_at_a_time_is_another_rate_than_of_the_mean(self):
    """Of three texts one has .84 on the first key, two .01."""
    weights = np.zeros((3, 1, 1, 2), np.float32)
    weights[:, 0, 0, 0] = 0.84, 0.01, 0.08
    weights[..., 1] = 1 - weights[..., 0]
    weights = jnp.asarray(weights)
    np.testing.assert_allclose(_probe("sinks", weights), [1 / 3], rtol=1e-6)
    np.testing.assert_array_equal(_probe("sink_of_means", weights), [1])
    lower = weights.at[0].set(jnp.array([[[0.5, 0.5]]]))
    np.testing.assert_allclose(_probe("sinks", lower), [1 / 3], rtol=1e-6)
    np.testing.assert_array_equal(_probe("sink_of_means", lower), [0])

  def test_maps_by_hand(self):
    maps = _maps(_FIRST, _OWN, _EVEN)
    np.testing.assert_array_equal(_probe("sinks", maps), [1, 1, 1])
    even = np.sqrt((1 + 0.5 + 1 / 3) / 3)
    np.testing.assert_allclose(
        _probe("concentration", maps), [1, 1, even], rtol=1e-6
    )
    local = _probe("local", maps)
    np.testing.assert_allclose(local[0], [1 / 3, 2 / 3, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(local[1], 1, rtol=1e-6)
    np.testing.assert_allclose(
        local[2, :2], [(1 + 0.5 + 1 / 3) / 3, (2 + 2 / 3) / 3], rtol=1e-6
    )
    # Maps of one entry a row, of which one of three is shared.
    np.testing.assert_allclose(
        _probe("diversity", _maps(_FIRST, _OWN)), 2 / 3, rtol=1e-6
    )
    np.testing.assert_allclose(
        _probe("diversity", _maps(_OWN, _OWN)), 0, atol=1e-6
    )
    self.assertEqual(float(_probe("diversity", _maps(_OWN))), 0)

  def test_what_has_no_row_sums_is_divided_by_them(self):
    maps = _maps(_EVEN)
    found = maps_lib.of_maps(("concentration", "local"), 5 * maps)
    np.testing.assert_allclose(
        found["concentration"], _probe("concentration", maps), rtol=1e-6
    )
    self.assertEqual(list(found), ["concentration", "local"])
    wanted = ("local", "concentration")
    self.assertEqual(tuple(maps_lib.of_maps(wanted, maps)), wanted)
    nothing = maps_lib.with_row_sums(0 * maps)
    np.testing.assert_array_equal(nothing, 0 * maps)

  def test_prefix_matching_is_what_stands_behind_the_same_token(self):
    # Six tokens, three twice: queries 3 to 5 look at keys 1 to 3.
    weights = np.zeros((1, 1, 6, 6), np.float32)
    weights[0, 0, [3, 4, 5], [1, 2, 3]] = 0.9, 0.6, 0.3
    weights[0, 0, [3, 4, 5], [0, 1, 2]] = 0.1, 0.4, 0.7
    found = maps_lib.prefix_matching(jnp.asarray(weights))
    np.testing.assert_allclose(found, [[0.6]], rtol=1e-6)

  def test_padding_and_empty_texts_change_nothing(self):
    """Text 1 is text 0 and junk behind it, text 2 is nothing."""
    maps = np.full((3, 2, 5, 5), 0.2, np.float32)
    maps[:2, :, :3] = 0
    maps[:2, 0, :3, :3] = _EVEN
    maps[:2, 1, :3, :3] = _OWN
    maps[2] = np.nan
    is_token = jnp.arange(5)[None] < jnp.array([3, 3, 0])[:, None]
    names = tuple(maps_lib.PROBES)
    found = maps_lib.text_sums(names, jnp.asarray(maps), is_token)
    want = maps_lib.of_maps(names, _maps(_EVEN, _OWN), normalize=False)
    for name in names:
      mean = maps_lib.of_mean(name, found[name] / 2)
      np.testing.assert_allclose(mean, want[name], rtol=1e-6, err_msg=name)


if __name__ == "__main__":
  absltest.main()
