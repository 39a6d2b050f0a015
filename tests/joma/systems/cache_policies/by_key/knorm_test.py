from absl.testing import parameterized
import numpy as np
import pytest

from joma.systems.cache_policies.by_key import knorm
from tests.joma.systems.cache_policies import plain


class Plain(plain.Plain):
  """The longest key leaves."""

  def score_prompt(self, tokens, seen):
    for token in tokens:
      self.enter(token, seen.head, token["pos"])

  def enter(self, token, head, position):
    token["score"] = -np.linalg.norm(token["key"])


_POLICIES = (knorm.Knorm(num_recent=2),)


class KnormTest(parameterized.TestCase):

  @parameterized.product(policy=_POLICIES)
  def test_keeps_what_plain_python_keeps_at_every_step(self, policy):
    plain.check(Plain, policy)

  @parameterized.product(policy=_POLICIES, heads=((4, 1), (4, 2), (3, 3)))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, policy, heads):
    plain.check(Plain, policy, *heads, num_steps=512)
