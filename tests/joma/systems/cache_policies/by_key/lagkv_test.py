from absl.testing import parameterized
import numpy as np
import pytest

from joma.systems.cache_policies.by_key import lagkv
from tests.joma.systems.cache_policies import plain


class Plain(plain.Plain):
  """Ranks in a chunk, once the chunk behind it is complete."""

  def score_prompt(self, tokens, seen):
    for token in tokens:
      token["score"] = 1.0
    end = self.policy.num_sinks + 2 * self.policy.lag_size
    while end <= seen.length:
      self._score_chunk(tokens, end)
      end += self.policy.lag_size

  def enter(self, token, head, position):
    token["score"] = 1.0

  def observe(self, kept, rows, position):
    past = position + 1 - self.policy.num_sinks
    size = self.policy.lag_size
    if past % size == 0 and past >= 2 * size:
      self._score_chunk(kept, position + 1)

  def _score_chunk(self, tokens, end):
    size = self.policy.lag_size
    later = [s for s in tokens if end - size <= s["pos"] < end]
    chunk = [s for s in tokens if end - 2 * size <= s["pos"] < end - size]
    if not chunk:
      return
    both = np.zeros(len(chunk))
    for kind in ("key", "value"):
      low = np.min([s[kind] for s in later], axis=0)
      high = np.max([s[kind] for s in later], axis=0)
      extent = np.where(high > low, high - low, 1.0)
      deviation = [np.std((s[kind] - low) / extent, ddof=1) for s in chunk]
      both += plain.softmax(np.array(deviation)) / 2
    for rank, i in enumerate(np.argsort(both)):
      chunk[i]["score"] = rank / size


_POLICIES = (lagkv.LagKV(num_sinks=1, lag_size=4),)


class LagKVTest(parameterized.TestCase):

  @parameterized.product(policy=_POLICIES)
  @pytest.mark.by_default(0)
  def test_keeps_what_plain_python_keeps_at_every_step(self, policy):
    plain.check(Plain, policy)

  @parameterized.product(policy=_POLICIES, heads=((4, 1), (4, 2), (3, 3)))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, policy, heads):
    plain.check(Plain, policy, *heads, num_steps=512)

  @parameterized.parameters(
      (dict(lag_size=1), "lag_size=1"),
  )
  def test_out_of_range_is_named(self, fields, message):
    # Where types are checked, values of a Literal are refused before.
    with self.assertRaisesRegex(Exception, message):
      lagkv.LagKV(**fields)
