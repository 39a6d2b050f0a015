from absl.testing import parameterized
import numpy as np
import pytest

from joma.systems.cache_policies.by_key import knorm
from tests.joma.systems.cache_policies import plain
from tests.laws import policy_laws


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

  @pytest.mark.slow
  def test_ties_do_not_hang_on_the_rounding_of_a_rotation(self):
    """Few different keys, so that most are equal; at once and one by one."""
    query, key, value = policy_laws.draw()
    arrays = (query, key[:, :4][:, np.arange(policy_laws.ALL) % 4], value)
    runs = [
        policy_laws.run(
            policy_laws.init(knorm.Knorm(num_recent=1), 8, keys=keys),
            arrays,
            rotate=policy_laws.rotate,
        )
        for keys in ("rotated", "raw")
    ]
    np.testing.assert_array_equal(runs[0].kept, runs[1].kept)
    np.testing.assert_array_equal(runs[0].cache.score, runs[1].cache.score)

  @parameterized.product(policy=_POLICIES, heads=((4, 1), (4, 2), (3, 3)))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, policy, heads):
    plain.check(Plain, policy, *heads, num_steps=512)
