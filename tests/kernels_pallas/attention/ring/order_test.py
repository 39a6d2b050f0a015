import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks
from kernels_pallas.attention.ring import order


class PiecesTest(parameterized.TestCase):

  @parameterized.parameters(1, 2, 3, 4, 8)
  def test_every_half_has_one_place_and_its_mirror_beside_it(self, number):
    held = [order.pieces_of(d, number, True) for d in range(number)]
    self.assertEqual(sorted(np.ravel(held).tolist()), list(range(2 * number)))
    for device, (even, odd) in enumerate(held):
      self.assertEqual((even % 2, odd % 2), (0, 1))
      self.assertEqual(even + odd, 2 * number - 1)
      self.assertEqual(min(even, odd), device)

  def test_in_parts_of_the_text_each_device_has_its_own(self):
    self.assertEqual(order.pieces_of(3, 8, False), (3,))


class PlanTest(parameterized.TestCase):

  def _work(self, where, length, number, is_balanced):
    """Pairs by device and step, counted one by one."""
    allowed = masks.allowed(where, length)
    size = length // (number * (2 if is_balanced else 1))
    holds = [order.pieces_of(d, number, is_balanced) for d in range(number)]
    at = lambda d: np.concatenate(
        [np.arange(p * size, (p + 1) * size) for p in holds[d]]
    )
    return np.array([
        [allowed[np.ix_(at(d), at((d - s) % number))].sum() for s in range(4)]
        for d in range(number)
    ])

  @parameterized.parameters(False, True)
  def test_work_is_counted_by_device_and_step(self, is_balanced):
    for where in (
        masks.causal(48),
        masks.streaming(48, window=9, num_sinks=2),
    ):
      np.testing.assert_array_equal(
          order._work(where, 48, 48, 4, is_balanced),
          self._work(where, 48, 4, is_balanced),
      )

  def test_a_causal_text_is_balanced(self):
    ring = order.plan(masks.causal(64), 64, 64, "seq", 4)
    self.assertTrue(ring.is_balanced)
    self.assertEqual((ring.num_steps, ring.multiple), (4, 8))
    work = order._work(masks.causal(64), 64, 64, 4, True)
    # Of a step but the first every device computes half of what it meets.
    np.testing.assert_array_equal(work[:, 1:], 16 * 16 // 2)

  def test_a_window_stays_and_goes_as_far_as_it_reaches(self):
    for window, steps in ((16, 2), (17, 2), (18, 3)):
      where = masks.sliding_window(64, window=window)
      ring = order.plan(where, 64, 64, "seq", 4)
      self.assertFalse(ring.is_balanced, window)
      self.assertEqual(ring.num_steps, steps, window)

  def test_what_is_traced_may_be_anything(self):
    where = masks.document(jnp.zeros((1, 16), jnp.int32))
    ring = order.plan(where, 16, 16, "seq", 4)
    self.assertEqual((ring.is_balanced, ring.num_steps), (True, 4))

  def test_a_ring_of_one_moves_nothing(self):
    ring = order.plan(masks.causal(16), 16, 16, "seq", 1)
    self.assertEqual((ring.is_balanced, ring.num_steps), (False, 1))


class ExchangeTest(absltest.TestCase):

  def test_there_and_back_by_every_number_of_devices(self):
    for number in (2, 3, 4):
      ring = order.Ring(
          axis="seq", num_devices=number, is_balanced=True, num_steps=number
      )
      text = jnp.arange(4 * number).reshape(number, 4)
      # Under vmap with an axis name permutations are as between devices.
      moved = jax.vmap(functools.partial(ring.enter, axis=0), axis_name="seq")(
          text
      )
      for device in range(number):
        wanted = [
            2 * piece + i
            for piece in order.pieces_of(device, number, True)
            for i in range(2)
        ]
        self.assertEqual(moved[device].tolist(), wanted)
      back = jax.vmap(functools.partial(ring.leave, axis=0), axis_name="seq")(
          moved
      )
      np.testing.assert_array_equal(back, text)


if __name__ == "__main__":
  absltest.main()
