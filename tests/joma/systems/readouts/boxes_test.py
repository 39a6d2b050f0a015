"""Boxes beside a NumPy form that counts areas box by box."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from joma.systems.readouts import boxes


def _draw(count):
  """Corners of boxes, of which many touch no other."""
  draw = np.random.default_rng(0)
  least = draw.uniform(0, 4, (2, count, 2))
  return np.concatenate([least, least + draw.uniform(0.1, 2, least.shape)], -1)


def _plain(one, two):
  area = lambda b: (b[2] - b[0]) * (b[3] - b[1])
  wide = min(one[2], two[2]) - max(one[0], two[0])
  high = min(one[3], two[3]) - max(one[1], two[1])
  both = wide * high if wide > 0 and high > 0 else 0.0
  either = area(one) + area(two) - both
  around = (max(one[2], two[2]) - min(one[0], two[0])) * (
      max(one[3], two[3]) - min(one[1], two[1])
  )
  return both / either, both / either - (around - either) / around


class BoxesTest(absltest.TestCase):

  def test_giou_is_that_of_areas(self):
    one, two = _draw(1000)
    wanted = np.array([_plain(a, b) for a, b in zip(one, two, strict=True)])
    one, two = jnp.float32(one), jnp.float32(two)
    # Quotients of areas up to 36 in float32.
    np.testing.assert_allclose(boxes.iou(one, two), wanted[:, 0], atol=2e-6)
    found = boxes.giou(one, two)
    np.testing.assert_allclose(found, wanted[:, 1], atol=2e-6)
    self.assertGreater((wanted[:, 0] == 0).sum(), 300)
    self.assertTrue((found > -1).all())
    np.testing.assert_allclose(boxes.giou(one, one), 1, atol=1e-6)

  def test_boxes_that_do_not_touch_have_a_gradient(self):
    apart = jnp.array([[0.1, 0.1, 0.2, 0.2], [0.8, 0.9, 0.1, 0.1]])
    grad = lambda f: jax.grad(
        lambda x: f(boxes.corners(x[:1]), boxes.corners(x[1:])).sum()
    )(apart)
    toward = np.asarray(grad(boxes.giou))
    self.assertTrue(np.isfinite(toward).all())
    self.assertTrue((toward[0, :2] > 0).all())
    np.testing.assert_array_equal(grad(boxes.iou), 0)
    # Nor do boxes without an area break it.
    empty = jnp.zeros((1, 4))
    found = jax.grad(lambda x: boxes.loss(x, empty).sum())(empty)
    self.assertTrue(np.isfinite(found).all())

  def test_loss_is_of_centre_size_and_corners(self):
    one = jnp.array([[0.5, 0.5, 0.2, 0.4]])
    two = jnp.array([[0.6, 0.5, 0.4, 0.4]])
    np.testing.assert_allclose(
        boxes.corners(one), [[0.4, 0.3, 0.6, 0.7]], atol=1e-6
    )
    # Areas .08 and .16, of which .2 x .4 = .08 is both; the smallest box
    # round them is the second: GIoU = .5.
    found = boxes.loss(one, two)
    np.testing.assert_allclose(found, [0.1 + 0.2 + 1 - 0.5], atol=1e-5)

  def test_a_head_says_boxes_within_the_unit(self):
    head, state = boxes.BoxHead(5), jnp.ones((3, 4))
    params = head.init(jax.random.key(0), state)
    found = head.apply(params, 100 * state)
    self.assertEqual(found.shape, (3, 4))
    self.assertTrue(((found >= 0) & (found <= 1)).all())


if __name__ == "__main__":
  absltest.main()
