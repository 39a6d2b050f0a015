"""MLPs that read less: bytes by hand, claims, and what is measured."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.sparsity import unit_rules
from joma.studies.systems.projections import compressed_mlps
from joma.studies.systems.projections import monarch as study
from joma.studies.systems.projections import monarch_subject as subjects
from joma.transformer import config as configs
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from tests.joma.studies.systems import small
from tests.joma.transformer import applied

_CONFIG = configs.TransformerConfig(
    vocab_size=9,
    num_layers=2,
    embed_dim=4,
    num_heads=2,
    num_kv_heads=2,
    head_dim=2,
    hidden_dim=8,
    activation="relu",
    use_gated_mlp=False,
)


def _subject():
  model = models.Transformer(_CONFIG, implementation="reference")
  tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 9)
  params = applied.params(model)
  return compressed_mlps.Compressed(model, params, tokens)


class CompressedTest(absltest.TestCase):

  def test_neurons_are_those_that_bytes_allow(self):
    """A neuron is 8 weights, a predictor of rank 1 is 4 + 8 + 8."""
    subject = compressed_mlps.Compressed(
        models.Transformer(_CONFIG), {}, jnp.zeros((1, 3), jnp.int32)
    )
    predicted = unit_rules.Predicted(rank=1, num_units=8)
    self.assertEqual(subject.num_neurons(44, predicted), 3)
    self.assertEqual(subject.num_neurons(43, predicted), 2)
    self.assertEqual(subject.num_neurons(44, unit_rules.Oracle()), 5)
    config = subjects.MonarchConfig(blocks=2, shares=(0.4, 0.8))
    # 2 matrices, 2 blocks, 4 + 8 numbers: 48 of 64 weights a rank.
    self.assertEqual(subjects.per_rank(config, subject), 48)
    self.assertEqual(subjects.rank_of(config, subject, 0.8), 1)
    with self.assertRaisesRegex(errors.UserError, "share=0.4 of an MLP's"):
      subjects.rank_of(config, subject, 0.4)

  @pytest.mark.slow
  def test_all_neurons_and_all_ranks_are_the_dense_model(self):
    subject = _subject()
    dense = subject.losses(subject.params)
    got = subject.with_neurons(unit_rules.Oracle(), 8, None)
    np.testing.assert_allclose(got, dense, atol=1e-5)
    fewer = subject.with_neurons(unit_rules.Oracle(), 2, None)
    self.assertGreater(np.abs(fewer - dense).max(), 1e-4)
    config, params, off = subject.projected(2, 2)
    self.assertLess(max(off.values()), 1e-5)
    np.testing.assert_allclose(subject.losses(params), dense, atol=1e-4)
    # Factors, and the matrices that they stand for.
    config, params, _ = subject.projected(2, 1)
    model = subject.model.clone(config=config)
    want = compressed_mlps._losses(model, params, subject.texts)
    np.testing.assert_allclose(subject.losses(params), want, atol=1e-5)


class StudyTest(parameterized.TestCase):

  def test_a_claim_wants_every_share(self):
    gap = lambda low: {"mean": low + 0.1, "low": low, "high": low + 0.2}
    found = {
        "off": 1e-7,
        "shares": [0.25, 0.5],
        "apart": {
            "low rank - Monarch": [gap(0.1), gap(-0.05)],
            "Monarch - Deja Vu": [gap(0.2), gap(0.01)],
        },
    }
    rows = study._claims(found)
    self.assertEqual([row["it"] for row in rows], ["holds", "FAILED", "holds"])
    self.assertIn("0.5: 0.050 [-0.050, 0.150]", rows[1]["measured"])
    rows = study._claims(found | {"off": 2e-5})
    self.assertEqual(rows[0]["it"], "FAILED")

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("monarch")
    self.assertLen(summary["claims"], 5)
    self.assertEqual(summary["claims"][0]["it"], "holds")
    rows = {
        (row["way"], round(row["bytes"], 6)): row for row in summary["rows"]
    }
    self.assertLen(rows, 2 * 6)
    for share in summary["shares"]:
      for way in ("low rank", "Monarch", "Monarch, tuned"):
        self.assertIn((way, round(share, 6)), rows)
    for row in summary["rows"]:
      self.assertLessEqual(row["bytes"], max(summary["shares"]) + 1e-9)
    figure, texts = small.drawn("monarch")
    self.assertLen(figure.axes, 1)
    self.assertContainsSubset(["Monarch, tuned", "Deja Vu", "oracle"], texts)

  @parameterized.parameters(
      (dict(shares=(0.5,)), "two or more different"),
      (dict(shares=(0.5, 1.5)), "must not be above 1"),
      (dict(blocks=1), "blocks must be at least 2"),
      (dict(num_texts=1), "num_texts must be at least 2"),
      (dict(num_tune=-1), "num_tune must be at least 0"),
      (dict(width=20), "width must be a multiple of 16"),
  )
  def test_settings_that_cannot_be_are_refused(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      subjects.MonarchConfig(**changes)


if __name__ == "__main__":
  absltest.main()
