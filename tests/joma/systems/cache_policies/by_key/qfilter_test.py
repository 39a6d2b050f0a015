from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from joma.systems.cache_policies.by_key import qfilter
from tests.joma.systems.cache_policies import plain


class Plain(plain.Plain):
  """Projections on singular vectors of the queries, in float64."""

  def _of_head(self, head):
    """Queries so far of a head's group, a list [T, H] each."""
    groups = len(self.queries[0]) // len(self.heads)
    mine = range(head * groups, (head + 1) * groups)
    return [np.array([q[n] for q in self.queries]) for n in mine]

  def _project(self, key, head):
    signed = []
    for n, queries in enumerate(self._of_head(head)):
      main = self.main[head][n]
      sign = -1 if main @ queries.sum(axis=0) < 0 else 1
      signed.append(sign * main)
    return np.mean(signed, axis=0) @ key

  def score_prompt(self, tokens, seen):
    if seen.head == 0:
      self.main = {}
    vectors = [np.linalg.svd(q)[2][0] for q in self._of_head(seen.head)]
    self.main[seen.head] = vectors
    for token in tokens:
      token["score"] = self._project(token["key"], seen.head)

  def enter(self, token, head, position):
    for n, queries in enumerate(self._of_head(head)):
      turned = queries.T @ (queries @ self.main[head][n])
      self.main[head][n] = turned / np.linalg.norm(turned)
    token["score"] = self._project(token["key"], head)


class QFilterTest(parameterized.TestCase):

  def test_keeps_what_plain_python_keeps_at_every_step(self):
    plain.check(Plain, qfilter.QFilter())

  @parameterized.parameters((4, 1), (4, 2), (3, 3))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, *heads):
    plain.check(Plain, qfilter.QFilter(), *heads, num_steps=512)


if __name__ == "__main__":
  absltest.main()
