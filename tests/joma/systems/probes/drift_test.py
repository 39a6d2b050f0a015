"""Drift beside plain loops over tokens, and the head that was moved."""

import math

from absl.testing import absltest
import jax.numpy as jnp
import numpy as np

from joma.systems.probes import drift

_DRAW = np.random.default_rng(0)
_ROLES = np.array([[0, 0, 1, 1, 1, 2], [1, 1, 0, 0, 2, 2]])
_AT = np.array([5, 3])


def _maps(seed):
  rows = np.random.default_rng(seed).exponential(size=(2, 3, 6, 6))
  rows = np.tril(rows)
  return (rows / rows.sum(axis=-1, keepdims=True)).astype(np.float32)


def _mass(maps, text, head):
  """By a loop over keys."""
  found = [0.0, 0.0, 0.0]
  for key in range(6):
    found[_ROLES[text, key]] += float(maps[text, head, _AT[text], key])
  return found


def _divergence(one, two):
  """KL of each from their mean, by the definition."""
  mean = [(p + q) / 2 for p, q in zip(one, two, strict=True)]
  kl = lambda x: sum(
      p * math.log(p / m) for p, m in zip(x, mean, strict=True) if p
  )
  return (kl(one) + kl(two)) / 2


class DriftTest(absltest.TestCase):

  def test_is_the_divergence_of_what_roles_get(self):
    one, two = _maps(1), _maps(2)
    found = drift.scores(
        [jnp.array(one)] * 2,
        [jnp.array(one), jnp.array(two)],
        jnp.array(_ROLES),
        jnp.array(_AT),
        3,
    )
    # Nothing moved in the first layer.
    np.testing.assert_allclose(found[0], 0, atol=1e-6)
    for head in range(3):
      wanted = np.mean([
          _divergence(_mass(one, t, head), _mass(two, t, head))
          for t in range(2)
      ])
      np.testing.assert_allclose(found[1, head], wanted, atol=1e-6)

  def test_is_from_nothing_to_log_2(self):
    one = jnp.array([[1.0, 0.0], [0.5, 0.5]])
    np.testing.assert_allclose(drift.divergence(one, one), 0, atol=1e-7)
    apart = drift.divergence(one, one[:, ::-1])
    np.testing.assert_allclose(apart, [math.log(2), 0], atol=1e-6)

  def test_heads_are_ranked_by_layer_and_place(self):
    scores = np.array([[0.1, 0.5, 0.2], [0.3, 0.0, 0.4]])
    found = drift.ranked(scores)
    self.assertEqual(found[:3], [(0, 1), (1, 2), (1, 0)])
    self.assertEqual(found[-1], (1, 1))


if __name__ == "__main__":
  absltest.main()
