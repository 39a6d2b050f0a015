import functools

from absl.testing import parameterized
import jax
import numpy as np
import pytest

from joma.systems.cache_policies.by_place import random
from tests.joma.systems.cache_policies import plain


class Plain(plain.Plain):
  """Whoever draws least leaves; draws are of layer, head and position alone."""

  def priorities(self, tokens, position, head):
    draws = _draw(
        self.policy.seed, self.layer, position, len(tokens), len(self.heads)
    )
    return [float(x) for x in draws[:, head]]


@functools.cache
def _draw(*arguments):
  return np.asarray(_draw_jitted(*arguments))


@functools.partial(jax.jit, static_argnames=("num_tokens", "num_heads"))
def _draw_jitted(seed, layer, position, num_tokens, num_heads):
  """By layer, position and head alone."""
  key = jax.random.fold_in(jax.random.key(seed), layer)
  key = jax.random.fold_in(key, position)
  return jax.random.uniform(key, (num_tokens, num_heads))


_POLICIES = (random.Random(seed=3),)


class RandomTest(parameterized.TestCase):

  @parameterized.product(policy=_POLICIES)
  def test_keeps_what_plain_python_keeps_at_every_step(self, policy):
    plain.check(Plain, policy)

  @parameterized.product(policy=_POLICIES, heads=((4, 1), (4, 2), (3, 3)))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, policy, heads):
    plain.check(Plain, policy, *heads, num_steps=512)
