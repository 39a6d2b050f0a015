from absl.testing import parameterized
import numpy as np
import pytest

from joma.systems.cache_policies.by_attention import scissorhands
from tests.joma.systems.cache_policies import plain


class Plain(plain.Plain):
  """How many of the last queries gave more than 1 / n, mean over a group."""

  def score_prompt(self, tokens, seen):
    first = max(seen.length - self.policy.history, 0)
    for t, token in enumerate(tokens):
      token["history"] = [
          seen.weights[:, i, t].mean() > 1 / (i + 1)
          for i in range(first, seen.length)
      ]

  def enter(self, token, head, position):
    token["history"] = []

  def priorities(self, tokens, position, head):
    return [sum(s["history"][-self.policy.history :]) for s in tokens]

  def observe(self, kept, rows, position):
    for i, token in enumerate(kept):
      given = [weights[i] for _, weights in rows]
      token["history"].append(np.mean(given) > 1 / len(kept))


_POLICIES = (scissorhands.Scissorhands(history=7, num_recent=2),)


class ScissorhandsTest(parameterized.TestCase):

  @parameterized.product(policy=_POLICIES)
  def test_keeps_what_plain_python_keeps_at_every_step(self, policy):
    plain.check(Plain, policy)

  @parameterized.product(policy=_POLICIES, heads=((4, 1), (4, 2), (3, 3)))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, policy, heads):
    plain.check(Plain, policy, *heads, num_steps=512)

  @parameterized.parameters(
      (dict(history=33), "33"),
  )
  def test_out_of_range_is_named(self, fields, message):
    # Where types are checked, values of a Literal are refused before.
    with self.assertRaisesRegex(Exception, message):
      scissorhands.Scissorhands(**fields)
