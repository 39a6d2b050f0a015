from absl.testing import parameterized
import numpy as np
import pytest

from joma.systems.cache_policies.by_key import rkv
from tests.joma.systems.cache_policies import plain


class Plain(plain.Plain):
  """A mean of attention, less what points along the mean direction."""

  def score_prompt(self, tokens, seen):
    first = max(seen.length - self.policy.window, 0)
    for t, token in enumerate(tokens):
      token["score"] = seen.weights[:, first:, t].mean()

  def priorities(self, tokens, position, head):
    unit = [s["key"] / np.linalg.norm(s["key"]) for s in tokens]
    mean = np.mean(unit, axis=0)
    cosine = np.array([u @ mean / np.linalg.norm(mean) for u in unit])
    attention = np.array([s["score"] for s in tokens])
    mix, wanted = self.policy.mix, attention / attention.sum()
    return list(mix * wanted - (1 - mix) * plain.softmax(cosine))

  def observe(self, kept, rows, position):
    for i, token in enumerate(kept):
      given = sum(weights[i] for _, weights in rows) / len(rows)
      token["score"] += (given - token["score"]) / self.policy.window


_POLICIES = (rkv.RKV(window=5, num_recent=3),)


class RKVTest(parameterized.TestCase):

  @parameterized.product(policy=_POLICIES)
  def test_keeps_what_plain_python_keeps_at_every_step(self, policy):
    plain.check(Plain, policy)

  @parameterized.product(policy=_POLICIES, heads=((4, 1), (4, 2), (3, 3)))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, policy, heads):
    plain.check(Plain, policy, *heads, num_steps=512)

  @parameterized.parameters(
      (dict(mix=1.5), "mix=1.5"),
  )
  def test_out_of_range_is_named(self, fields, message):
    # Where types are checked, values of a Literal are refused before.
    with self.assertRaisesRegex(Exception, message):
      rkv.RKV(**fields)
