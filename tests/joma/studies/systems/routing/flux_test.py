"""Prompts of two kinds, and routers that begin where another model ended."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import pytest

from joma.studies.systems.routing import flux
from joma.studies.systems.subjects import two_prompts
from tests.joma.studies.systems import small


class FluxTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("flux")
    self.assertLen(summary["claims"], 6)
    rows = summary["rows"]
    self.assertNotIn("auc", rows["full, full"])
    # A router that is not trained reads everything.
    self.assertEqual(rows["router, s* = 0"]["sparse"], [0, 0])
    figure, texts = small.drawn("flux")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["needle", "share of sparse layers"], texts)


class PromptsTest(parameterized.TestCase):

  @parameterized.parameters(False, True)
  def test_answers_are_one_link_away_or_two(self, helps):
    task = two_prompts.Prompts(
        num_chains=2, num_symbols=5, window=6, helps=helps
    )
    found = task.draw(jax.random.key(0), 6)
    tokens, targets, is_asked, is_scored = map(np.asarray, found)
    self.assertEqual(tokens.shape, (6, 26))
    for row in (0, 2, 4):
      links = dict(tokens[row, :8].reshape(4, 2).tolist())
      num = {0: 0, 5: 0, 10: 0}
      for place in np.flatnonzero(is_asked[row]):
        marker, asked = tokens[row, place - 1 : place + 1]
        want = links[asked]
        want = links[want] if marker == 22 else want
        self.assertEqual(targets[row, place], want)
        self.assertEqual(is_scored[row, place], marker == 22)
        num[asked // 5 * 5] += 1
      self.assertEqual(num, {0: 4, 5: 2 if helps else 0, 10: 0})
      # As much of nothing as a window lies between links and questions.
      first = np.flatnonzero(is_asked[row])[0] - 1
      self.assertGreaterEqual(first - 8, 6)
      np.testing.assert_array_equal(tokens[row, 8:first], 20)

  def test_local_answers_stand_four_places_before(self):
    task = two_prompts.Prompts(num_chains=2, num_symbols=5, window=6)
    tokens, targets, is_asked, _ = map(
        np.asarray, task.draw(jax.random.key(0), 4)
    )
    for row in (1, 3):
      places = np.flatnonzero(is_asked[row])
      np.testing.assert_array_equal(places, np.arange(22, 26))
      np.testing.assert_array_equal(
          targets[row, places], tokens[row, places - 4]
      )
      self.assertTrue(((15 <= tokens[row]) & (tokens[row] < 20)).all())

  def test_what_is_known_is_laid_over_what_is_drawn(self):
    drawn = {"a": 1, "attn": {"flux": {"in": 2}, "query": {"kernel": 3}}}
    known = {"a": 4, "attn": {"query": {"kernel": 5}}}
    self.assertEqual(
        two_prompts.laid_over(drawn, known),
        {"a": 4, "attn": {"flux": {"in": 2}, "query": {"kernel": 5}}},
    )

  def test_the_area_is_the_share_of_pairs_in_order(self):
    auc = two_prompts.auc(np.array([3, 2]), np.array([1, 2, 5]))
    # 3 is above 1 and 2; 2 above 1 and equal to 2.
    self.assertAlmostEqual(auc, (2 + 1 + 0.5) / 6)

  @pytest.mark.slow
  def test_a_router_goes_on_from_what_is_known(self):
    config = flux.FluxConfig(width=16)
    dense = flux.problem(config, ("full", "full"))
    routed = flux.problem(config, (0.5, 0.5))
    key = jax.random.key
    known, drawn = dense.init(key(0)), routed.init(key(1))
    start = two_prompts.laid_over(drawn, known)
    own = start["layers_1"]["attn"].pop("flux")
    start["layers_0"]["attn"].pop("flux")
    jax.tree.map(np.testing.assert_array_equal, start, known)
    np.testing.assert_array_equal(own["multipliers"], config.cost)


if __name__ == "__main__":
  absltest.main()
