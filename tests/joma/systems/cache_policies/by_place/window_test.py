from absl.testing import parameterized
import pytest

from joma.systems.cache_policies.by_place import window
from tests.joma.systems.cache_policies import plain


class Plain(plain.Plain):
  """The oldest leaves."""

  def priorities(self, tokens, position, head):
    return [token["pos"] for token in tokens]


_POLICIES = (
    window.Window(),
    window.StreamingLLM(num_sinks=3),
)


class WindowTest(parameterized.TestCase):

  @parameterized.product(policy=_POLICIES)
  @pytest.mark.by_default(0)
  def test_keeps_what_plain_python_keeps_at_every_step(self, policy):
    plain.check(Plain, policy)

  @parameterized.product(policy=_POLICIES, heads=((4, 1), (4, 2), (3, 3)))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, policy, heads):
    plain.check(Plain, policy, *heads, num_steps=512)
