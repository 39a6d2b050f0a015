"""Tests of the prediction from co-occurrence."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from joma.inference.bridge import theory

# Rounding of float64 sums over a few thousand pairs.
_ATOL = 1e-13


def _planted(rng, num_windows, num_tokens):
  """Fillers 0 to 5; query 6 is followed by 7 after an 8, or else by 9."""
  windows = rng.integers(0, 6, size=(num_windows, num_tokens))
  is_key = rng.uniform(size=num_windows) < 0.5
  place = rng.integers(0, num_tokens - 2, size=num_windows)
  windows[is_key, place[is_key]] = 8
  windows[:, -2] = 6
  windows[:, -1] = np.where(is_key, 7, 9)
  return windows


class GrowthTest(absltest.TestCase):

  def test_planted_key_is_found_and_no_other(self):
    windows = _planted(np.random.default_rng(0), 2000, 10)
    found = theory.growth(windows, 10)
    # Of all keys the query may see, the one that tells what follows grows.
    seen = found.frequency[6] > 0
    np.testing.assert_array_equal(np.flatnonzero(seen), [*range(6), 8])
    self.assertEqual(found.velocity[6].argmax(), 8)
    self.assertGreater(found.velocity[6, 8], 0)
    for scores in (
        theory.type_scores(found),
        theory.discriminancy(found),
    ):
      self.assertEqual(scores.argmax(), 8)

  def test_is_the_gradient_at_uniform_attention(self):
    """The loss of a layer with logits Z, its decoder learned on other text."""
    rng = np.random.default_rng(1)
    size, length = 5, 7
    windows = rng.integers(0, size, size=(12, length))
    found = theory.growth(windows, size)
    halves = windows[::2], windows[1::2]
    with jax.enable_x64(True):
      expected = [
          _velocity_by_autodiff(text, other, size)
          for text, other in (halves, halves[::-1])
      ]
    np.testing.assert_allclose(
        found.velocity, np.mean(expected, axis=0), atol=_ATOL
    )

  def test_softmax_conserves_the_sum_of_every_row(self):
    windows = _planted(np.random.default_rng(2), 40, 12)
    found = theory.growth(windows, 10)
    np.testing.assert_allclose(found.velocity.sum(axis=1), 0, atol=_ATOL)
    # b sums to 1 at each query that sees a key.
    np.testing.assert_allclose(
        found.frequency.sum(axis=1), found.query_probs, atol=_ATOL
    )

  def test_order_within_the_context_does_not_matter_to_the_last_query(self):
    windows = _planted(np.random.default_rng(3), 40, 12)
    found = theory._decoder(windows[:, -3:], 10)
    permuted = windows.copy()
    permuted[:, :-2] = windows[:, -3::-1]
    first = theory._velocity(windows, *found)[0][6]
    second = theory._velocity(permuted, *found)[0][6]
    np.testing.assert_allclose(first, second, atol=_ATOL)

  def test_parts_are_put_together(self):
    windows = _planted(np.random.default_rng(4), 30, 9)
    whole = theory.growth(windows, 10)
    limit = theory._NUM_PAIRS
    theory._NUM_PAIRS = 4 * 81
    self.addCleanup(setattr, theory, "_NUM_PAIRS", limit)
    parts = theory.growth(windows, 10)
    np.testing.assert_allclose(whole.velocity, parts.velocity, atol=_ATOL)


def _cases(windows):
  """Every context with a token in it, the query and what comes next."""
  for row in windows:
    for i in range(1, len(row) - 1):
      yield row[:i], row[i], row[i + 1]


def _velocity_by_autodiff(windows, other, size):
  """E[g^T b] by Z at Z = 0, with Y and alpha as the module's docstring."""
  bigrams = np.zeros((size, size))
  for _, query, following in _cases(other):
    bigrams[query, following] += 1
  alpha = bigrams / np.maximum(bigrams.sum(axis=1, keepdims=True), 1)
  one_hot = np.eye(size)
  cases = list(_cases(other))
  decoder = sum(
      np.outer(one_hot[keys].mean(axis=0), one_hot[n] - alpha[m])
      for keys, m, n in cases
  ) / len(cases)

  # Contexts padded to one length: one small program for all of them.
  cases = list(_cases(windows))
  keys = np.stack([np.pad(k, (0, 9 - len(k))) for k, _, _ in cases])
  is_key = np.arange(9) < np.array([[len(k)] for k, _, _ in cases])
  query, following = np.array([case[1:] for case in cases]).T
  error = one_hot[following] - alpha[query]
  worth = np.einsum("iln,in->il", decoder[keys], error)

  def gain(attn_logits):
    logits = attn_logits[query[:, None], keys]
    b = jax.nn.softmax(logits, where=is_key)
    return jnp.where(is_key, b * worth, 0).sum(axis=1).mean()

  return np.asarray(jax.jit(jax.grad(gain))(jnp.zeros((size, size))))


if __name__ == "__main__":
  absltest.main()
