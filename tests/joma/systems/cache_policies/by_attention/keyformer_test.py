import functools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import policy as policy_lib
from joma.systems.cache_policies.by_attention import keyformer
from tests.joma.systems.cache_policies import plain


class Plain(plain.Plain):
  """Sums of softmax((logits + noise) / tau), tau growing after the prompt."""

  def score_prompt(self, tokens, seen):
    for t, token in enumerate(tokens):
      token["noise"] = self._noise(seen.head, t)
    noise = np.array([token["noise"] for token in tokens])
    for logits in seen.logits:
      for i in range(seen.length):
        noisy = logits[i, : i + 1] + noise[: i + 1]
        for t, w in enumerate(plain.softmax(noisy / self.policy.tau_start)):
          tokens[t]["score"] += w

  def enter(self, token, head, position):
    token["noise"] = self._noise(head, position)

  def observe(self, kept, rows, position):
    policy = self.policy
    done = min(position / policy.num_steps, 1)
    tau = policy.tau_start + (policy.tau_end - policy.tau_start) * done
    noise = np.array([token["noise"] for token in kept])
    for logits, _ in rows:
      given = plain.softmax((logits + noise) / tau)
      for token, w in zip(kept, given, strict=True):
        token["score"] += w

  def _noise(self, head, position):
    noise = _draws(self.policy.seed, self.layer, len(self.heads))
    return float(noise[position, head])


@functools.cache
def _draws(seed, layer, num_heads):
  """Of positions up to 600, [T, K]: each from a key of its own."""
  draw = lambda position: jax.random.gumbel(
      policy_lib.random_key(seed, layer, position), (num_heads,)
  )
  return np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(600)))


_POLICIES = (keyformer.Keyformer(num_steps=100, seed=1),)


class KeyformerTest(parameterized.TestCase):

  @parameterized.product(policy=_POLICIES)
  def test_keeps_what_plain_python_keeps_at_every_step(self, policy):
    plain.check(Plain, policy)

  @parameterized.product(policy=_POLICIES, heads=((4, 1), (4, 2), (3, 3)))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, policy, heads):
    plain.check(Plain, policy, *heads, num_steps=512)

  @parameterized.parameters(
      (dict(tau_end=0.0), "tau_end=0.0"),
  )
  def test_out_of_range_is_named(self, fields, message):
    # Where types are checked, values of a Literal are refused before.
    with self.assertRaisesRegex(Exception, message):
      keyformer.Keyformer(**fields)
