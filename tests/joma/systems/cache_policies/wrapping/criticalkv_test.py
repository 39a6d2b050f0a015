import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.cache import policy as policy_lib
from joma.inference.cost import cache_plan
from joma.systems.cache_policies.by_attention import h2o
from joma.systems.cache_policies.by_attention import snapkv
from joma.systems.cache_policies.by_key import knorm
from joma.systems.cache_policies.wrapping import criticalkv
from joma.transformer import config as configs
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from tests.joma.systems.cache_policies import plain
from tests.joma.systems.cache_policies.by_attention import h2o_test
from tests.joma.systems.cache_policies.by_attention import snapkv_test
from tests.joma.transformer import applied


class Plain(plain.Plain):
  """Its base's tokens; half of them by score, half by score and value."""

  base, kernel = h2o_test.Plain, None

  def __init__(self, policy, *sizes):
    super().__init__(policy, *sizes)
    self.inner = self.base(policy.base, *sizes)

  def score_prompt(self, tokens, seen):
    self.inner.score_prompt(tokens, seen)

  def observe(self, kept, rows, position):
    self.inner.observe(kept, rows, position)

  def priorities(self, tokens, position, head):
    scores = self.inner.priorities(tokens, position, head)
    protected = self.policy.num_sinks + self.policy.num_recent
    count = int(self.policy.first_share * (self.capacity - protected))
    may_leave = [
        i
        for i, token in enumerate(tokens)
        if self.policy.num_sinks
        <= token["pos"]
        < position - self.policy.num_recent
    ]
    order = sorted(may_leave, key=lambda i: (scores[i], tokens[i]["pos"]))
    first = order[len(order) - count :]
    found = []
    for i, token in enumerate(tokens):
      second = (scores[i] + self.policy.epsilon) * self._norm(token, head)
      found.append(1e9 if i in first else second)
    return found

  def _norm(self, token, head):
    if self.kernel is None:
      return np.abs(token["value"]).sum()
    groups = len(self.kernel) // len(self.heads)
    mine = self.kernel[head * groups : (head + 1) * groups]
    return sum(np.abs(token["value"] @ w).sum() for w in mine) / groups


_POLICIES = (
    criticalkv.CriticalKV(base=h2o.H2O(num_sinks=1, num_recent=2)),
    criticalkv.CriticalKV(
        base=snapkv.SnapKV(window=3), first_share=0.3, epsilon=0.1
    ),
)


def _check(policy, num_heads=4, num_kv_heads=2, **sizes):
  """With an output projection of unequal heads."""
  draws = np.random.default_rng(1)
  # As wide as the input that the call is given.
  width = 8 * num_kv_heads
  kernel = draws.standard_normal((num_heads, 8, width), np.float32)
  kernel *= np.arange(1, num_heads + 1)[:, None, None]
  is_h2o = isinstance(policy.base, h2o.H2O)
  base = h2o_test.Plain if is_h2o else snapkv_test.Plain
  rule = type("Rule", (Plain,), dict(base=base, kernel=kernel))
  kernel = jax.device_put(kernel)
  plain.check(rule, policy, num_heads, num_kv_heads, out_kernel=kernel, **sizes)


class CriticalKVTest(parameterized.TestCase):

  @parameterized.parameters(*_POLICIES)
  @pytest.mark.by_default(0)
  def test_keeps_what_plain_python_keeps_at_every_step(self, policy):
    _check(policy, num_steps=8)

  @parameterized.product(policy=_POLICIES, heads=((4, 1), (4, 2), (3, 3)))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, policy, heads):
    _check(policy, *heads, num_steps=512)

  @pytest.mark.slow
  def test_without_a_projection_values_stand_for_themselves(self):
    plain.check(Plain, _POLICIES[0])

  @parameterized.parameters("prompt", "step")
  @pytest.mark.slow
  def test_a_model_hands_its_output_projection_on(self, reading):
    """Norms of all tokens by NumPy, read at once or one by one."""
    config = configs.TransformerConfig(
        vocab_size=7,
        num_layers=1,
        embed_dim=12,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        hidden_dim=8,
        max_len=16,
    )
    model = models.Transformer(config, implementation="reference")
    params, tokens = applied.params(model), jnp.array([[1, 2, 3, 4, 5]])
    caches = kv_cache.init(_POLICIES[0], config, 1, 8)
    spans = [(0, 5)] if reading == "prompt" else [(t, t + 1) for t in range(5)]
    for start, stop in spans:
      _, caches = model.apply(
          {"params": params},
          tokens[:, start:stop],
          positions=jnp.arange(start, stop)[None],
          kv_cache=caches,
      )
    attn = params["layers_0"]["attn"]
    kernel = np.asarray(attn["out"]["kernel"])
    self.assertEqual(kernel.shape, (4, 4, 12))
    value = np.asarray(caches[0].value.data)[0, :, :5]
    for head in range(2):
      mine = kernel[2 * head : 2 * head + 2]
      added = np.abs(np.einsum("CH,GHD->CGD", value[head], mine)).sum(-1)
      np.testing.assert_allclose(
          caches[0].aux[1][0, head, :5], added.mean(-1), rtol=1e-5
      )

  def test_by_hand(self):
    """Four may leave, two by attention; the second by what values add."""
    base = h2o.H2O(num_recent=1)
    policy = criticalkv.CriticalKV(base=base, epsilon=0.0).with_capacity(5)
    row = lambda *x: jnp.array([[x]])
    slots = policy_lib.Slots(
        key=jnp.zeros((1, 1, 5, 2)),
        value=jnp.zeros((1, 1, 5, 2)),
        score=row(4.0, 3.0, 2.0, 1.0, 0.0),
        pos=row(0, 1, 2, 3, 4),
        aux=(None, row(1.0, 1.0, 1.0, 8.0, 1.0)),
    )
    found = calls.rank(policy, slots, jnp.array([5]))
    np.testing.assert_allclose(
        found[0, 0], np.float32([1e30, 1e30, 2, 8, np.inf])
    )

  def test_costs_a_norm_a_slot_more(self):
    plan = calls.plan(_POLICIES[0], (8, 8), "x")
    base = cache_plan.scored((8, 8), "x")
    self.assertEqual(plan.slot_state, base.slot_state + 4)
    self.assertEqual(plan.slot_traffic, base.slot_traffic + 4)

  @parameterized.parameters(
      (dict(first_share=1.0), "first_share=1.0"),
      (dict(epsilon=-1.0), "epsilon=-1.0"),
      (dict(base=knorm.Knorm()), "criticalkv:knorm: .*criticalkv:h2o"),
  )
  def test_out_of_range_is_named(self, fields, message):
    with self.assertRaisesRegex(errors.UserError, message):
      dataclasses.replace(_POLICIES[0], **fields)


if __name__ == "__main__":
  absltest.main()
