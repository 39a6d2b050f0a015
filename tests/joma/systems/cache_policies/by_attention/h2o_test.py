from absl.testing import parameterized
import numpy as np
import pytest

from joma.systems.cache_policies.by_attention import h2o
from scansnap_jax.experiment import errors
from tests.joma.systems.cache_policies import plain


class Plain(plain.Plain):
  """Sums of weights, aged or not, over the query heads or of the greatest."""

  def score_prompt(self, tokens, seen):
    decay = self.policy.decay if self.policy.score == "ema" else 1.0
    for t, token in enumerate(tokens):
      aged = sum(
          seen.weights[:, i, t] * decay ** (seen.length - 1 - i)
          for i in range(seen.length)
      )
      token["score"] = self._joined(aged)

  def priorities(self, tokens, position, head):
    if self.policy.score != "mean":
      return [s["score"] for s in tokens]
    return [s["score"] / max(position - s["pos"], 1) for s in tokens]

  def observe(self, kept, rows, position):
    decay = self.policy.decay if self.policy.score == "ema" else 1.0
    for i, token in enumerate(kept):
      given = self._joined(np.array([weights[i] for _, weights in rows]))
      token["score"] = decay * token["score"] + given

  def _joined(self, given):
    return given.sum() if self.policy.reduce == "sum" else given.max()


_POLICIES = (
    h2o.H2O(),
    h2o.H2O(score="ema", decay=0.9),
    h2o.H2O(score="mean", num_recent=2),
    h2o.H2O(num_sinks=2, num_recent=3),
    h2o.H2O(reduce="max", num_recent=1),
)


class H2OTest(parameterized.TestCase):

  @parameterized.product(policy=_POLICIES)
  @pytest.mark.by_default(0)
  def test_keeps_what_plain_python_keeps_at_every_step(self, policy):
    plain.check(Plain, policy)

  @parameterized.product(policy=_POLICIES, heads=((4, 1), (4, 2), (3, 3)))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, policy, heads):
    plain.check(Plain, policy, *heads, num_steps=512)

  @parameterized.parameters(
      (dict(decay=0.0), "decay=0.0"),
      (dict(score="median"), "median"),
      (dict(reduce="vote"), "vote"),
      (dict(num_sinks=-1), "num_sinks=-1"),
  )
  def test_out_of_range_is_named(self, fields, message):
    # Where types are checked, values of a Literal are refused before.
    with self.assertRaisesRegex(Exception, message):
      h2o.H2O(**fields)

  def test_protecting_every_slot_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "protect 8 slots.*at most 7"):
      h2o.H2O(num_sinks=4, num_recent=4).with_capacity(8)
