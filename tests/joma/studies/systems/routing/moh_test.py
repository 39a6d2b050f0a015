"""Routed heads: the task, the information, the tiles, and closed heads."""

import dataclasses
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import pytest

from joma.studies.systems.routing import moh
from joma.studies.systems.subjects import closed_heads
from joma.studies.systems.subjects import routed_heads
from joma.transformer import config as configs
from joma.transformer import model as models
from tests.joma.studies.systems import small
from tests.joma.transformer import applied

_CONFIG = configs.TransformerConfig(
    vocab_size=9,
    num_layers=2,
    embed_dim=8,
    num_heads=3,
    num_kv_heads=3,
    head_dim=4,
    hidden_dim=8,
    embed_scale=4.0,
)


class MohTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("moh")
    self.assertLen(summary["claims"], 5)
    self.assertEqual(summary["claims"][3]["it"], "holds")  # Counted.
    self.assertEmpty(summary["checkpoint"])
    figure, texts = small.drawn("moh")
    self.assertLen(figure.axes, 1)
    self.assertContainsSubset(["2 of 4 heads", "step"], texts)

  def test_a_class_says_its_own_places(self):
    what = moh.problem(moh.MohConfig(batch_size=4, seq_len=9), "2 of 4 heads")
    symbol, kind, target = map(np.asarray, what.draw(jax.random.key(0)))
    self.assertEqual(set(kind.ravel()), {0, 1})
    for row in range(4):
      for place in range(4, 9):
        first = place - 1 - 2 * kind[row, place]
        want = [symbol[row, first], symbol[row, first - 1]]
        np.testing.assert_array_equal(target[row, place], want)

  def test_no_router_hears_all_heads(self):
    entries = [
        moh.problem(moh.MohConfig(), name).layer.config.attention[0]
        for name in moh.MODELS
    ]
    self.assertEqual(
        entries,
        [
            "positional+moh:shared=0:active=2",
            "positional",
            "positional+moh:shared=0:active=1",
        ],
    )


class InformationTest(absltest.TestCase):

  def test_is_that_of_counts_by_hand(self):
    sets = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    told = routed_heads.information
    self.assertAlmostEqual(told(sets, np.array([0, 0, 1, 1])), 1)
    self.assertAlmostEqual(told(sets, np.array([0, 1, 0, 1])), 0)
    # One of four is on the other side: H(3/4) left of a class of entropy
    # H(1/2): 1 + H(1/4) - (1/2 + 1/2 + 1/2) bits of joint 1/2, 1/4, 1/4.
    by_set = 1.0
    by_class = 0.75 * np.log2(4 / 3) + 0.25 * 2
    want = (by_set + by_class - 1.5) / by_class
    self.assertAlmostEqual(told(sets, np.array([0, 0, 0, 1])), want)


class ClosedHeadsTest(parameterized.TestCase):

  def test_the_best_heads_are_those_that_cost_most(self):
    costs = np.array([[0.1, 0.4, 0.3], [3.0, 1.0, 2.0]])
    self.assertEqual(
        closed_heads.entries("fixed", 2, costs),
        ("moh_norms:heads=1.2", "moh_norms:heads=0.2"),
    )
    self.assertEqual(
        closed_heads.entries("random", 2, costs),
        ("moh_norms:active=2:by=random",),
    )

  @pytest.mark.slow
  def test_a_removed_head_is_one_that_is_closed(self):
    model = models.Transformer(_CONFIG, implementation="reference")
    params = applied.params(model)
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 9)
    costs = closed_heads.removal_costs(model, params, tokens)
    self.assertEqual(costs.shape, (2, 3))
    entries = ("moh_norms:heads=0.2", "softmax")
    changed = model.clone(
        config=dataclasses.replace(_CONFIG, attention=entries)
    )
    want = closed_heads._loss(changed, params, tokens)
    np.testing.assert_allclose(costs[0, 1], want, atol=1e-5)
    self.assertGreater(np.ptp(costs), 1e-3)

  @pytest.mark.slow
  def test_a_checkpoint_is_read_at_every_share(self):
    model = models.Transformer(_CONFIG, implementation="reference")
    loaded = mock.patch.object(
        closed_heads.pretrained,
        "load",
        lambda _: (_CONFIG, applied.params(model)),
    )
    ids = np.random.default_rng(0).integers(0, 9, 50)
    text = mock.Mock(train=ids[:25], valid=ids[25:])
    corpus = mock.patch.object(
        closed_heads.corpus_lib, "load", lambda *_, **__: text
    )
    with loaded, corpus:
      found = closed_heads.measure("somewhere", "text", 8, 2)
    np.testing.assert_allclose(found["shares"], [1 / 3, 2 / 3])
    self.assertEqual([*found["by_rule"]], ["norms", "random", "fixed"])
    values = np.array([*found["by_rule"].values()])
    self.assertEqual(values.shape, (3, 2))
    self.assertGreater(np.abs(values - found["perplexity"]).min(), 1e-4)


if __name__ == "__main__":
  absltest.main()
