from absl.testing import absltest
import jax
import numpy as np
import pytest

from joma.studies.systems import sinks
from tests.joma.studies.systems import small


class SinksTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("sinks")
    claims = {row["claim"].partition(":")[0]: row for row in summary["claims"]}
    # Both are untrained and alike: one loss, no copies, no fewer sinks.
    self.assertEqual(claims["softmax have the same loss"]["it"], "holds")
    self.assertEqual(claims["they copy what they should"]["it"], "FAILED")
    self.assertEqual(claims["decay 5"]["it"], "FAILED")
    figure, texts = small.drawn("sinks")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["loss (nats)"], texts)

  def test_every_claim_is_told_with_its_direction(self):
    row = lambda sink, loss=1.0: {
        "rates": [sink, sink + 0.01],
        "loss": {"mean": loss},
        "accuracy": {"mean": 0.995},
        "sink": {"mean": sink, "low": sink, "high": sink},
    }
    rows = {name: row(0.2) for name in sinks.MODELS}
    rows |= {"k-bias": row(0.1), "rate x 4": row(0.5), "decay 5": row(0.0)}
    told = [claim["it"] for claim in sinks._claims(rows)]
    holds, fails = "holds", "FAILED"
    want = [holds, holds, holds, fails, fails, holds, fails, holds, fails]
    self.assertEqual(told, want)
    rows |= {"k-bias": row(0.11, loss=1.03)}
    self.assertEqual([c["it"] for c in sinks._claims(rows)][:3:2], [fails] * 2)

  def test_what_follows_a_trigger_is_the_token_before_it(self):
    task = sinks.Backcopy(seq_len=40, vocab_size=7, num_triggers=2)
    tokens, targets, is_asked, is_copy = map(
        np.asarray, task.draw(jax.random.key(0), 5)
    )
    np.testing.assert_array_equal(tokens[:, 0], 0)
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
    self.assertTrue(is_asked.all())
    self.assertGreater(is_copy.sum(), 20)
    for text, place in np.argwhere(is_copy):
      self.assertIn(tokens[text, place], (1, 2))
      self.assertEqual(targets[text, place], tokens[text, place - 1])
      self.assertGreater(place, 1)


if __name__ == "__main__":
  absltest.main()
