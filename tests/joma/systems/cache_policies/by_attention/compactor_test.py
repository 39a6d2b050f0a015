from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from joma.systems.cache_policies.by_attention import compactor
from scansnap_jax.experiment import errors
from tests.joma.systems.cache_policies import plain


def _moments(rows):
  x = np.concatenate(rows)
  return x.mean(), x.std(ddof=1)


class Plain(plain.Plain):
  """Token by token, in float64."""

  def read(self, query, key, value):
    self.length = len(query)
    policy, heads = self.policy, len(self.heads)
    phi = np.eye(key.shape[-1])[None].repeat(heads, 0)
    if policy.sketch_size is not None:
      phi = np.float64(
          compactor.directions(policy, self.layer, heads, key.shape[-1])
      )
    self.phi, self.state = phi, None
    counted = range(policy.num_sinks, self.length - policy.num_recent)
    self.found = {}
    if len(counted):
      self._score(query, key, value, [*counted])
    super().read(query, key, value)

  def _score(self, query, key, value, counted):
    heads, policy = len(self.heads), self.policy
    groups, given, leverage, state = query.shape[1] // heads, [], [], []
    for h in self.heads:
      keys = np.float64(key[counted, h])
      mean = keys.mean(axis=0)
      rows = (keys - mean) @ self.phi[h]
      inverse = np.linalg.inv(rows.T @ rows + 1e-2 * np.eye(rows.shape[1]))
      leverage.append(np.array([x @ inverse @ x for x in rows]))
      state.append((mean, inverse))
      mass = np.zeros(len(counted))
      for first in range(0, len(counted), policy.chunk_size):
        chunk = range(first, min(first + policy.chunk_size, len(counted)))
        for t in chunk:
          for n in range(h * groups, (h + 1) * groups):
            logits = keys[chunk] @ query[counted[t], n]
            logits *= self.scale if policy.is_scaled else 1
            mass[chunk] += plain.softmax(logits) / groups
      mass *= np.linalg.norm(value[counted, h], axis=-1)
      mass = np.pad(mass, 1)
      given.append((mass[:-2] + mass[1:-1] + mass[2:]) / 3)
    share = policy.blending
    if share is None:
      share = max(1 - self.capacity / self.length, 0)
    center, spread = _moments(leverage)
    self.state = state, center, spread, share
    for h in self.heads:
      z = share * (leverage[h] - center) / spread
      mean, deviation = _moments(given)
      z = z + (given[h] - mean) / deviation
      self.found |= {(h, t): x for t, x in zip(counted, z, strict=True)}

  def score_prompt(self, tokens, seen):
    for token in tokens:
      token["score"] = self.found.get((seen.head, token["pos"]), 0.0)

  def enter(self, token, head, position):
    if self.state is not None:
      state, center, spread, share = self.state
      mean, inverse = state[head]
      x = (token["key"] - mean) @ self.phi[head]
      token["score"] = share * (x @ inverse @ x - center) / spread


class CompactorTest(parameterized.TestCase):

  def test_keeps_what_plain_python_keeps_at_every_step(self):
    self._check(compactor.Compactor(num_sinks=1, num_recent=2, chunk_size=6))

  @parameterized.parameters(
      dict(chunk_size=7, sketch_size=None, blending=0.4),
      dict(chunk_size=64, sketch_size=5, is_scaled=False),
      dict(chunk_size=3, num_sinks=0, blending=2.0),
  )
  @pytest.mark.slow
  def test_over_512_steps(self, **fields):
    fields = {"num_sinks": 2, "num_recent": 3} | fields
    policy = compactor.Compactor(**fields)
    self._check(policy, num_steps=512, capacity=20)

  def _check(self, policy, **sizes):
    plain.check(Plain, policy, **sizes)

  @parameterized.parameters(
      (dict(chunk_size=0), "chunk_size"),
      (dict(sketch_size=0), "sketch_size"),
      (dict(blending=-1.0), "blending=-1.0 must be at least 0"),
  )
  def test_out_of_range_is_named(self, fields, message):
    with self.assertRaisesRegex(errors.UserError, message):
      compactor.Compactor(**fields)

  def test_too_few_slots_are_named(self):
    with self.assertRaisesRegex(errors.UserError, "num_sinks=8 and num_recent"):
      compactor.Compactor().with_capacity(12)


if __name__ == "__main__":
  absltest.main()
