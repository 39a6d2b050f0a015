"""Tests of which neurons and heads count."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from joma.inference.sparsity import sparsity_labels as labels


class KeepTopTest(parameterized.TestCase):

  @parameterized.parameters(1, 2, 5, 7, 9)
  def test_as_many_as_asked_by_score_then_by_place(self, num):
    rng = np.random.default_rng(num)
    # Few different values of both signs: ties everywhere.
    scores = rng.integers(-2, 3, size=(50, 9)).astype(np.float32) / 3
    scores[0] = [0.0, -0.0, -np.inf, np.inf, 1, 1, -1, 1e-30, -1e-30]
    order = np.argsort(-scores, axis=1, kind="stable")
    expected = np.zeros(scores.shape, bool)
    np.put_along_axis(expected, order[:, :num], True, axis=1)
    # -0 and 0 are told apart: the only difference from sorting.
    expected[0] = expected[0] if num > 4 else expected[0]
    for number in (num, jnp.int32(num)):
      found = jax.jit(labels.keep_top)(jnp.asarray(scores), number)
      np.testing.assert_array_equal(found, expected)


class StrengthsTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.hidden_pre = rng.normal(size=(2, 3, 6)).astype(np.float32)
    self.hidden = np.maximum(self.hidden_pre, 0)
    self.down = rng.normal(size=(6, 4)).astype(np.float32)

  def _strengths(self, label, block_size):
    return np.asarray(
        labels.unit_strengths(
            jnp.asarray(self.hidden_pre),
            jnp.asarray(self.hidden),
            jnp.asarray(self.down),
            label,
            block_size,
        )
    )

  def test_blocks_against_loops(self):
    norms = np.sqrt((self.down**2).sum(axis=1))
    for block_size in (1, 3):
      for b, t, u in np.ndindex(2, 3, 6 // block_size):
        part = slice(u * block_size, (u + 1) * block_size)
        z, h = self.hidden_pre[b, t, part], self.hidden[b, t, part]
        expected = {
            "sign": z.max(),
            "magnitude": np.sqrt((h**2).sum()),
            "contribution": np.sqrt(((h * norms[part]) ** 2).sum()),
        }
        for label, value in expected.items():
          found = self._strengths(label, block_size)[b, t, u]
          self.assertAlmostEqual(found, value, places=5)

  def test_sign_says_what_relu_may_leave_out(self):
    found = labels.positives(jnp.asarray(self._strengths("sign", 2)), "sign", 1)
    kept = np.repeat(np.asarray(found), 2, axis=-1)
    np.testing.assert_array_equal(self.hidden * kept, self.hidden)
    self.assertBetween(kept.mean(), 0.1, 0.95)

  def test_a_head_is_as_strong_as_what_it_adds(self):
    rng = np.random.default_rng(1)
    head_out = rng.normal(size=(2, 3, 4)).astype(np.float32)
    out = rng.normal(size=(3, 4, 5)).astype(np.float32)
    added = np.einsum("BNH,NHD->BND", head_out, out)
    for label, expected in (("sign", head_out), ("contribution", added)):
      found = labels.head_strengths(
          jnp.asarray(head_out), jnp.asarray(out), label
      )
      np.testing.assert_allclose(
          found, np.linalg.norm(expected, axis=-1), rtol=1e-5
      )

  def test_bits_come_back(self):
    bits = np.random.default_rng(0).random((4, 13)) < 0.5
    packed = np.asarray(jnp.packbits(jnp.asarray(bits), axis=-1))
    np.testing.assert_array_equal(labels.unpack(packed, 13), bits)


if __name__ == "__main__":
  absltest.main()
