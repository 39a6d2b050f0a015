"""Superlinear attention: which keys spans cover, and what a query reads."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.systems.mixers import anchors as anchors_lib
from joma.systems.mixers import superlinear
from scansnap_jax.experiment import errors
from tests.joma.systems.selectors import selected

_QUERIES = 4000


def _uncovered(behind, s, places=None):
  """Queries some key before whose window is in no span."""
  anchors = anchors_lib.Anchors(3, s, behind, 0.0)
  position = jnp.arange(_QUERIES)
  if places is None:
    places = anchors.places(position, anchors.num(_QUERIES))
  wide = jnp.broadcast_to(position[:, None], places.shape)
  start, stop = map(np.asarray, anchors.span(wide, places, _QUERIES))
  # From the window backwards: the first key that all so far reach.
  reach = np.maximum(np.arange(_QUERIES) + 1 - anchors.window, 0)
  for number in range(start.shape[1]):
    is_next = stop[:, number] >= reach
    reach = np.where(is_next, np.minimum(reach, start[:, number]), reach)
  return np.flatnonzero(reach > 0)


def _by_hand(system, query, key, value, search, t):
  """One query of one key head, by a plain loop."""
  places = [t - i**2 + 1 for i in range(system.s + 1, t + 2)]
  places = [a for a in places if a >= 0]
  places = sorted(places, key=lambda a: -(search @ key[a]))[: system.k]
  first = t + 1 - ((system.s + 1) ** 2 - 1)
  window = list(range(max(first, 0), t + 1))

  def attend(keys):
    weights = np.exp(key[keys] @ query * 8**-0.5)
    return weights @ value[keys] / weights.sum()

  if not places:
    return attend(window)
  gate = np.exp([search @ key[a] for a in places])
  reach = int(np.ceil(system.behind * np.sqrt(t + 1)))
  spans = [
      [s for s in range(max(a - reach, 0), a + 1) if s < first] for a in places
  ]
  outs = [attend(span + window) for span in spans]
  return np.einsum("w,wh->h", gate / gate.sum(), np.array(outs))


class SuperlinearTest(parameterized.TestCase):

  @parameterized.parameters(0, 3)
  @pytest.mark.by_default(1)
  def test_no_key_is_out_of_reach(self, s):
    """The twins: a reach of 1.9, and anchors on a grid of sqrt(T)."""
    self.assertEmpty(_uncovered(2.0, s))
    found = _uncovered(1.9, s)
    self.assertEqual((len(found), found[0]), (2408, 898))
    grid = jnp.arange(_QUERIES)[:, None] - 63 * jnp.arange(1, 64)[None]
    self.assertGreater(len(_uncovered(2.0, s, grid)), 100)

  @pytest.mark.slow
  def test_a_query_reads_its_window_and_the_best_spans(self):
    system = superlinear.Superlinear(k=2, s=1, behind=0.5)
    query, key, value = selected.draw(30)
    search = selected.draw(30, seed=1)[1]
    call = selected.call(30)
    out = jax.jit(lambda *arrays: system.attend(*arrays, call))(
        query, key, value, search
    )
    for t in (0, 2, 3, 4, 11, 29):
      for head in range(4):
        rows = (x[1, :, head // 2] for x in (key, value, search))
        key_, value_, search_ = map(np.asarray, rows)
        want = _by_hand(
            system, np.asarray(query[1, t, head]), key_, value_, search_[t], t
        )
        np.testing.assert_allclose(out[1, t, head], want, atol=1e-5)

  def test_says_what_would_be_right(self):
    with self.assertRaisesRegex(errors.UserError, "k must be at least 1"):
      superlinear.Superlinear(k=0)


if __name__ == "__main__":
  absltest.main()
