from absl.testing import absltest
import numpy as np

from joma.systems.closed_form import random_features


class FeaturesTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.generator = np.random.default_rng(0)
    self.heads = random_features.head_weights(self.generator, 5, 3)
    self.query = self.generator.normal(size=(7, 3))
    self.keys = self.generator.normal(size=(7, 4, 3))

  def _features(self, keys):
    return random_features.attention_features(self.heads, self.query, keys)

  def test_features_are_the_definition(self):
    value = self.generator.normal(size=(5, 4))
    got = self._features(self.keys) @ value.ravel()
    one = lambda x: np.append(x, 1)
    for b in range(7):
      want = 0.0
      for head, along in zip(self.heads, value, strict=True):
        for key in self.keys[b]:
          score = one(self.query[b]) @ head @ one(key)
          want += max(score, 0) * (along @ one(key)) / 4
      self.assertAlmostEqual(got[b], want, places=12)

  def test_the_order_of_keys_says_nothing(self):
    turned = self.keys[:, ::-1]
    np.testing.assert_allclose(
        self._features(self.keys), self._features(turned), atol=1e-14
    )
    units = random_features.network_weights(self.generator, 5, 15)
    one, two = (
        random_features.network_features(units, self.query, keys)
        for keys in (self.keys, turned)
    )
    self.assertGreater(np.abs(one - two).max(), 0.1)

  def test_the_closed_form_is_the_limit_of_gradient_descent(self):
    features = self._features(self.keys)
    targets = self.generator.normal(size=7)
    for kept in (features, features[:, :4]):  # Fewer examples; fewer features.
      closed = random_features.ridge(kept, targets[:, None], (1.0, 1e-2))
      closed = closed[1, :, 0]
      walked = random_features.descend(kept, targets, 1e-2, 2000)
      np.testing.assert_allclose(kept @ closed, kept @ walked, atol=1e-9)
      # It is the least: no other value is better.
      loss = lambda v, kept=kept: (
          np.square(kept @ v - targets).mean() + 1e-2 * v @ v
      )
      for _ in range(5):
        step = 0.1 * self.generator.normal(size=closed.shape)
        self.assertGreater(loss(closed + step), loss(closed))

  def test_biased_heads_begin_with_correlations(self):
    draw = lambda is_biased: random_features.head_weights(
        np.random.default_rng(1), 2000, 3, is_biased=is_biased
    )
    np.testing.assert_allclose(draw(False).mean(axis=0), 0, atol=0.03)
    np.testing.assert_allclose(
        draw(True) - draw(False), np.broadcast_to(np.eye(4) / 2, (2000, 4, 4))
    )


if __name__ == "__main__":
  absltest.main()
