import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import trial
from joma.systems.cache_policies.by_attention import h2o
from joma.systems.cache_policies.by_attention import snapkv
from joma.systems.cache_policies.by_key import keydiff
from joma.systems.cache_policies.wrapping import cam
from scansnap_jax.experiment import errors
from tests.joma.systems.cache_policies import plain
from tests.joma.systems.cache_policies.by_attention import h2o_test
from tests.joma.systems.cache_policies.by_attention import snapkv_test
from tests.laws import policy_laws


class Plain(plain.Plain):
  """Its base's choices; values go on token by token."""

  base, num_merges = h2o_test.Plain, None

  def __init__(self, policy, *sizes):
    super().__init__(policy, *sizes)
    self.inner = self.base(policy.base, *sizes)

  def score_prompt(self, tokens, seen):
    self.inner.score_prompt(tokens, seen)

  def observe(self, kept, rows, position):
    self.inner.observe(kept, rows, position)

  def priorities(self, tokens, position, head):
    return self.inner.priorities(tokens, position, head)

  def leave(self, gone, stays, head, position):
    stays = sorted(stays, key=lambda token: token["pos"])
    scores = self.priorities(stays, position, head)
    added = [np.zeros_like(token["value"]) for token in stays]
    for token, score in zip(
        gone, self.priorities(gone, position, head), strict=True
    ):
      behind = [i for i, s in enumerate(stays) if s["pos"] > token["pos"]]
      behind = behind[: self.policy.num_merged]
      if not behind:
        continue
      mean = np.mean([scores[i] for i in behind])
      if _draws(self.policy.seed)[head, token["pos"]] * mean < score:
        self.num_merges[0] += 1
        for i in behind:
          added[i] = added[i] + token["value"] / len(behind)
    for token, more in zip(stays, added, strict=True):
      token["value"] = token["value"] + more


@functools.cache
def _draws(seed):
  """Of layer 0, by head and position: all that is not the oracle's own."""
  key = lambda pos: policy_lib.random_key(seed, 0, pos)
  draw = lambda head, pos: jax.random.uniform(
      jax.random.fold_in(key(pos), head)
  )
  over = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))
  return np.asarray(over(jnp.arange(4), jnp.arange(600)))


_POLICIES = (
    cam.CaM(base=h2o.H2O(num_sinks=1, num_recent=2), num_merged=3),
    cam.CaM(base=snapkv.SnapKV(window=3), num_merged=32, seed=7),
)


def _check(policy, *heads, **sizes):
  is_h2o = isinstance(policy.base, h2o.H2O)
  base = h2o_test.Plain if is_h2o else snapkv_test.Plain
  rule = type("Rule", (Plain,), dict(base=base, num_merges=[0]))
  plain.check(rule, policy, *heads, **sizes)
  return rule.num_merges[0]


class CaMTest(parameterized.TestCase):

  def test_keeps_what_plain_python_keeps_at_every_step(self):
    self.assertGreater(_check(_POLICIES[0], num_steps=6), 5)

  @parameterized.product(policy=_POLICIES, heads=((4, 1), (4, 2), (3, 3)))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, policy, heads):
    self.assertGreater(_check(policy, *heads, num_steps=512), 100)

  def test_by_hand(self):
    """Slots in no order; the token at 2 leaves, 3 and 5 follow, 1 does not."""
    policy = cam.CaM(base=h2o.H2O(num_recent=0), num_merged=2).with_capacity(5)
    row = lambda *x: jnp.array([[x]])
    slots = policy_lib.Slots(
        key=jnp.zeros((1, 1, 5, 1)),
        value=row(1.0, 10.0, 100.0, 1000.0, 10000.0)[..., None],
        score=row(2.0, 1.0, 9.0, 3.0, 9.0),
        pos=row(5, 3, 1, 2, 7),
        aux=(None, None),
    )
    stays = row(True, True, True, False, True)
    found = calls.merged(policy, slots, row(3), stays, jnp.array([8]))
    # 3 is more than the mean of 2 and 1: no chance is at work.
    np.testing.assert_allclose(
        found[0, 0, :, 0], [501.0, 510.0, 100.0, 1000.0, 10000.0]
    )

  @pytest.mark.slow
  def test_merges_as_often_as_their_attention_says(self):
    """A third of the mean: a third of 3,000 draws, to four deviations."""
    policy = cam.CaM(base=h2o.H2O(num_recent=0), num_merged=1).with_capacity(8)
    steps = 2 * jnp.arange(3000)
    pos = jnp.stack([steps, steps + 1], -1).reshape(1, 1, -1)
    slots = policy_lib.Slots(
        key=jnp.zeros((1, 1, 6000, 1)),
        value=jnp.ones((1, 1, 6000, 1)),
        score=jnp.where(pos % 2 == 0, 1.0, 3.0),
        pos=pos,
        aux=(None, None),
    )
    found = calls.merged(policy, slots, pos, pos % 2 == 1, jnp.array([6000]))
    mean = float((found[0, 0, 1::2, 0] - 1).mean())
    self.assertAlmostEqual(mean, 1 / 3, delta=4 * (2 / 9 / 3000) ** 0.5)

  @pytest.mark.slow
  def test_int8_hands_on_too(self):
    """Rounded to 1/127 of the largest number; no draw is that near."""
    policy = dataclasses.replace(_POLICIES[0], seed=1)
    caches = kv_cache.init(
        policy, policy_laws.CONFIG, 3, policy_laws.FEW, dtype=jnp.int8
    )
    got = policy_laws.run(caches[0], policy_laws.draw())
    want = policy_laws.read(policy, policy_laws.FEW)
    np.testing.assert_array_equal(got.kept, want.kept)
    np.testing.assert_allclose(got.steps, want.steps, atol=0.1)

  def test_cannot_take_tokens_back(self):
    caches = kv_cache.init(_POLICIES[0], policy_laws.CONFIG, 1, 8)
    with self.assertRaisesRegex(errors.UserError, "cam, cannot give tokens"):
      trial.check(caches)

  @parameterized.parameters(
      (dict(num_merged=0), "num_merged=0"),
      (dict(base=keydiff.KeyDiff()), "cam:keydiff: .*cam:h2o"),
  )
  def test_out_of_range_is_named(self, fields, message):
    with self.assertRaisesRegex(errors.UserError, message):
      dataclasses.replace(_POLICIES[0], **fields)


if __name__ == "__main__":
  absltest.main()
