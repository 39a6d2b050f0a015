from absl.testing import parameterized
import numpy as np
import pytest

from joma.systems.cache_policies.by_attention import tova
from tests.joma.systems.cache_policies import plain


class Plain(plain.Plain):
  """What the last query gave, mean over all heads of the layer."""

  def score_prompt(self, tokens, seen):
    for t, token in enumerate(tokens):
      token["score"] = seen.of_all[:, -1, t].mean()

  def observe_all(self, rows, position):
    # All heads hold the same tokens in the same slots.
    kept = [[s for s in slots if s is not None] for slots in self.slots]
    for i, same in enumerate(zip(*kept, strict=True)):
      for token in same:
        token["score"] = np.mean([weights[i] for _, _, weights in rows])


_POLICIES = (tova.TOVA(),)


class TOVATest(parameterized.TestCase):

  @parameterized.product(policy=_POLICIES)
  def test_keeps_what_plain_python_keeps_at_every_step(self, policy):
    plain.check(Plain, policy)

  @parameterized.product(policy=_POLICIES, heads=((4, 1), (4, 2), (3, 3)))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, policy, heads):
    plain.check(Plain, policy, *heads, num_steps=512)
