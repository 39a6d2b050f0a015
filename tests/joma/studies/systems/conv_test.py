from absl.testing import absltest
import jax
import numpy as np
import pytest

from joma.studies.systems import conv
from tests.joma.studies.systems import small


class ConvTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("conv")
    verdicts = [row["it"] for row in summary["claims"]]
    # Of models that answer half of the keys, all alike.
    self.assertEqual(verdicts, ["FAILED", "holds", "FAILED"])
    figure, texts = small.drawn("conv")
    self.assertLen(figure.axes, 1)
    self.assertContainsSubset([*conv.MODELS, "step"], texts)

  @pytest.mark.slow
  def test_keys_have_one_value_in_a_text_and_are_asked_again(self):
    task = conv.Recall(seq_len=24, num_pairs=3, num_keys=5, num_values=7)
    tokens, targets, is_asked, _ = map(
        np.asarray, task.draw(jax.random.key(0), 4)
    )
    for text, target, asked in zip(tokens, targets, is_asked, strict=True):
      value_of = dict(zip(text[:6:2], text[1:6:2], strict=True))
      self.assertLen(value_of, 3)
      self.assertLen(set(value_of.values()), 3)
      self.assertEqual(np.flatnonzero(asked).tolist(), [*range(6, 24, 2)])
      for place in np.flatnonzero(asked):
        self.assertEqual(target[place], value_of[text[place]])


if __name__ == "__main__":
  absltest.main()
