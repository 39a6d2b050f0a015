from absl.testing import parameterized
import numpy as np
import pytest

from joma.systems.cache_policies.by_key import expected_attention
from tests.joma.systems.cache_policies import plain


class Plain(plain.Plain):
  """log E exp(scale q.k) of normal queries to come, judged as a key enters."""

  def score_prompt(self, tokens, seen):
    for token in tokens:
      self._expect(token, seen.head)

  def enter(self, token, head, position):
    self._expect(token, head)

  def priorities(self, tokens, position, head):
    judged = [s for s in tokens if s["pos"] >= self.policy.num_sinks]
    groups = len(judged[0]["expected"])
    expected = sum(
        plain.softmax(np.array([s["expected"][g] for s in judged]))
        for g in range(groups)
    )
    by_pos = {
        s["pos"]: e / groups * np.linalg.norm(s["value"])
        for s, e in zip(judged, expected, strict=True)
    }
    return [by_pos.get(s["pos"], 0.0) for s in tokens]

  def _expect(self, token, head):
    """Without positions: the mean rotation of those to come is the identity."""
    seen = np.array(self.queries[self.policy.num_sinks :])
    groups = len(self.queries[0]) // len(self.heads)
    key = token["key"]
    token["expected"] = []
    for n in range(head * groups, (head + 1) * groups):
      if not len(seen):
        token["expected"].append(0.0)
        continue
      mean = seen[:, n].mean(axis=0)
      centred = seen[:, n] - mean
      covariance = centred.T @ centred / len(seen)
      token["expected"].append(
          self.scale * key @ mean + self.scale**2 / 2 * key @ covariance @ key
      )


_POLICIES = (
    expected_attention.ExpectedAttention(
        num_sinks=2, num_recent=1, num_future=3
    ),
)


class ExpectedAttentionTest(parameterized.TestCase):

  @parameterized.product(policy=_POLICIES)
  def test_keeps_what_plain_python_keeps_at_every_step(self, policy):
    plain.check(Plain, policy)

  @parameterized.product(policy=_POLICIES, heads=((4, 1), (4, 2), (3, 3)))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, policy, heads):
    plain.check(Plain, policy, *heads, num_steps=512)

  @parameterized.parameters(
      (dict(num_future=0), "num_future=0"),
  )
  def test_out_of_range_is_named(self, fields, message):
    # Where types are checked, values of a Literal are refused before.
    with self.assertRaisesRegex(Exception, message):
      expected_attention.ExpectedAttention(**fields)
