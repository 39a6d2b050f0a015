from absl.testing import parameterized
import numpy as np
import pytest

from joma.systems.cache_policies.by_key import keydiff
from tests.joma.systems.cache_policies import plain


class Plain(plain.Plain):
  """Whoever points most along the mean direction leaves."""

  def priorities(self, tokens, position, head):
    unit = [s["key"] / np.linalg.norm(s["key"]) for s in tokens]
    mean = np.mean(unit, axis=0)
    return [-u @ mean / np.linalg.norm(mean) for u in unit]


_POLICIES = (keydiff.KeyDiff(num_recent=2),)


class KeyDiffTest(parameterized.TestCase):

  @parameterized.product(policy=_POLICIES)
  def test_keeps_what_plain_python_keeps_at_every_step(self, policy):
    plain.check(Plain, policy)

  @parameterized.product(policy=_POLICIES, heads=((4, 1), (4, 2), (3, 3)))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, policy, heads):
    plain.check(Plain, policy, *heads, num_steps=512)
