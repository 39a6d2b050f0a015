from absl.testing import parameterized
import pytest

from joma.systems.cache_policies.by_attention import snapkv
from scansnap_jax.experiment import errors
from tests.joma.systems.cache_policies import plain


class Plain(plain.Plain):
  """What the prompt's last queries gave, smoothed; then a mean as long."""

  def score_prompt(self, tokens, seen):
    first = seen.length - self.policy.window
    around = self.policy.kernel_size // 2
    for t, token in enumerate(tokens):
      near = [
          seen.weights[:, max(first, 0) :, u].mean()
          for u in range(t - around, t + around + 1)
          if 0 <= u < first
      ]
      token["score"] = sum(near) / self.policy.kernel_size

  def observe(self, kept, rows, position):
    for i, token in enumerate(kept):
      given = sum(weights[i] for _, weights in rows) / len(rows)
      token["score"] += (given - token["score"]) / self.policy.window


_POLICIES = (snapkv.SnapKV(window=4, kernel_size=3),)


class SnapKVTest(parameterized.TestCase):

  @parameterized.product(policy=_POLICIES)
  def test_keeps_what_plain_python_keeps_at_every_step(self, policy):
    plain.check(Plain, policy)

  @parameterized.product(policy=_POLICIES, heads=((4, 1), (4, 2), (3, 3)))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, policy, heads):
    plain.check(Plain, policy, *heads, num_steps=512)

  @parameterized.parameters(
      (dict(kernel_size=4), "odd"),
  )
  def test_out_of_range_is_named(self, fields, message):
    # Where types are checked, values of a Literal are refused before.
    with self.assertRaisesRegex(Exception, message):
      snapkv.SnapKV(**fields)

  def test_a_window_of_all_slots_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "num_recent=32"):
      snapkv.SnapKV().with_capacity(32)


class PyramidTest(parameterized.TestCase):

  @parameterized.parameters((1, 64), (2, 64), (12, 128), (30, 100), (7, 33))
  def test_layers_fall_and_sum_to_the_budget(self, num_layers, capacity):
    sizes = snapkv.PyramidKV(window=8).capacities(num_layers, capacity)
    self.assertEqual(sum(sizes), num_layers * capacity)
    self.assertEqual(sorted(sizes, reverse=True), list(sizes))
    self.assertGreaterEqual(sizes[-1], 9)

  def test_a_last_layer_above_the_mean_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "beta=0.5"):
      snapkv.PyramidKV(beta=0.5)
