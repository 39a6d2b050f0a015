from absl.testing import absltest
from absl.testing import parameterized
import pytest

from joma.systems.cache_policies.by_attention import finch
from tests.joma.systems.cache_policies import plain


class Plain(plain.Plain):
  """Weights of the last queries, each times the tokens that it could see."""

  def score_prompt(self, tokens, seen):
    first = max(seen.length - self.policy.window, 0)
    for t, token in enumerate(tokens):
      given = [
          (row + 1) * weights[row, t]
          for weights in seen.weights
          for row in range(first, seen.length)
      ]
      token["score"] = sum(given) / len(given)

  def observe(self, kept, rows, position):
    for i, token in enumerate(kept):
      given = sum(weights[i] for _, weights in rows) / len(rows) * len(kept)
      token["score"] += (given - token["score"]) / self.policy.window


_POLICY = finch.Finch(window=4)


class FinchTest(parameterized.TestCase):

  def test_keeps_what_plain_python_keeps_at_every_step(self):
    plain.check(Plain, _POLICY, num_steps=8)

  @parameterized.parameters((4, 1), (4, 2), (3, 3))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, *heads):
    plain.check(Plain, _POLICY, *heads, num_steps=512)

  def test_out_of_range_is_named(self):
    with self.assertRaisesRegex(Exception, "window=0"):
      finch.Finch(window=0)


if __name__ == "__main__":
  absltest.main()
