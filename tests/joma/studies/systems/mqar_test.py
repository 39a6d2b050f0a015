from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.studies.systems import mqar
from joma.studies.systems import mqar_claims
from joma.studies.systems import mqar_texts
from scansnap_jax.experiment import errors
from tests.joma.studies.systems import small


def _share(mean):
  return {"mean": mean, "low": mean, "high": mean}


def _row(*means, near=0.5, far=0.1, gap=0.0):
  """What a model came to, by number of pairs."""
  pairs = [
      {
          "accuracy": _share(mean),
          "accuracies": [mean - gap, mean + gap],
          "near": _share(near),
          "far": far and _share(far),
      }
      for mean in means
  ]
  return {"pairs": pairs}


def _verdicts(**rows):
  named = {
      "softmax": "softmax + conv",
      "linear": "lightning + conv",
      "delta": "gdn",
      "conv": "gated_conv",
      "hybrid": "3 gdn + 1 softmax",
      "short": "3 gdn + 1 softmax + conv",
  }
  found = mqar_claims.rows(
      (4, 16), 16, {named[name]: rows[name] for name in rows}
  )
  return [row["it"] for row in found]


class MqarTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("mqar")
    # Of models that are not trained; all keys of so short texts are near.
    verdicts = [row["it"] for row in summary["claims"]]
    self.assertEqual(verdicts, ["FAILED"])
    self.assertIsNone(summary["rows"]["gated_conv"]["pairs"][1]["far"])
    figure, texts = small.drawn("mqar")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(
        ["softmax + conv", "step", "1 pairs", "2 pairs"], texts
    )

  def test_each_claim_is_held_at_its_own_number_of_pairs(self):
    good, bad = "holds", "FAILED"
    # The keys have 16 channels: of 16 pairs nothing is claimed of the rule.
    self.assertEqual(_verdicts(delta=_row(0.96, 0.2)), [good])
    self.assertEqual(_verdicts(delta=_row(0.94, 1.0)), [bad])
    self.assertEqual(_verdicts(softmax=_row(1.0, 0.94)), [bad])
    # Less of the most pairs, from every seed.
    both = lambda gap: _verdicts(
        linear=_row(0.1, 0.5, gap=gap), delta=_row(1.0, 0.6)
    )
    self.assertEqual(both(0.05), [good, good])
    self.assertEqual(both(0.15), [good, bad])
    # Near of the fewest, a guess being .25; far of the most, .0625.
    conv = lambda **found: _verdicts(conv=_row(0.5, 0.5, **found))
    self.assertEqual(conv(near=0.36, far=0.11), [good, good])
    self.assertEqual(conv(near=0.34, far=0.12), [bad, bad])
    self.assertEqual(conv(far=None), [good])
    hybrid = lambda *means: _verdicts(
        hybrid=_row(*means), softmax=_row(1.0, 0.98)
    )
    self.assertEqual(hybrid(0.98, 0.96), [good, good])
    self.assertEqual(hybrid(0.98, 0.94), [good, bad])
    both = lambda plain, short: _verdicts(
        hybrid=_row(1.0, plain), short=_row(1.0, short), softmax=_row(1.0, 0.98)
    )
    self.assertEqual(both(0.96, 0.94), [good, good, bad])
    self.assertEqual(both(0.94, 0.96), [good, bad, good])
    self.assertEqual(_verdicts(short=_row(1.0, 0.1)), [])

  def test_far_is_of_the_most_pairs(self):
    few, most = _row(0.5, far=0.9), _row(0.5, far=0.1)
    row = {"pairs": few["pairs"] + most["pairs"]}
    self.assertEqual(_verdicts(conv=row), ["holds", "holds"])
    row["pairs"].reverse()
    self.assertEqual(_verdicts(conv=row), ["holds", "FAILED"])

  def test_of_one_pair_no_guess_is_claimed_wrong(self):
    claims = mqar_claims.rows((1, 4), 16, {"gated_conv": _row(0.5, 0.5)})
    self.assertLen(claims, 1)
    self.assertIn("guess of 4 pairs", claims[0]["claim"])
    self.assertEmpty(mqar_claims.rows((1,), 16, {"gated_conv": _row(0.5)}))

  @parameterized.parameters(44, 46)
  def test_near_and_far_are_told_apart_by_what_two_layers_see(self, distance):
    config = mqar.MqarConfig(
        num_pairs=(4, 16), num_keys=16, batch_size=2, seq_len=200
    )
    learner = mqar.learner(config, "softmax")
    seen = learner.task.draw_kind(jax.random.key(1), 3, 16)
    behind = np.asarray(mqar_texts.distances(seen))
    # A key is no answer.
    said = jnp.where(behind == distance, seen.targets, 0)
    oracle = mock.Mock()
    oracle.apply = lambda params, tokens: jax.nn.one_hot(said, 48)
    with mock.patch.object(mqar_texts.PairsLearner, "transformer", oracle):
      found = mqar._by_distance(learner, {}, jax.random.key(1), 3, 16)
    asked = behind[np.asarray(seen.is_asked)]
    # Keys at even places: 44 back is within 22 tokens twice, 46 is not.
    kinds = asked, asked[asked < 45], asked[asked > 45]
    for share, here in zip(found, kinds, strict=True):
      self.assertAlmostEqual(float(share), (here == distance).mean(), places=6)
    self.assertGreater(found[0], 0)

  @parameterized.parameters(
      (dict(num_pairs=()), "num_pairs must be one or more rising .* got none"),
      (dict(num_pairs=(8, 4)), "num_pairs must .* got 8,4"),
      (dict(num_pairs=(0, 4)), "num_pairs must .* got 0,4"),
      (dict(num_pairs=(4, 33)), "num_keys must .* 33"),
      (dict(batch_size=6), "batch_size must be a multiple of 4, got 6"),
      (dict(seq_len=64), "seq_len must .* num_pairs=32, got 64"),
      (dict(seq_len=99), "seq_len must be even .* got 99"),
      (dict(target=0.0), "target"),
  )
  def test_settings_that_cannot_be_are_refused(self, settings, message):
    with self.assertRaisesRegex(errors.UserError, message):
      mqar.MqarConfig(**settings)


if __name__ == "__main__":
  absltest.main()
