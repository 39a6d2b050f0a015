import math

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from scansnap_jax.experiment import figures
from scansnap_jax.figures import theory
from tests.scansnap_jax.figures import made_up


def _h(t, num_tokens, eta_y):
  """Solves e^{M h} + (M - 1) M h = M eta_y t + 1 by bisection, in float64."""
  low, high = np.zeros_like(t), np.full_like(t, 40.0)
  for _ in range(80):
    x = (low + high) / 2
    above = np.exp(x) + (num_tokens - 1) * x > num_tokens * eta_y * t + 1
    low, high = np.where(above, low, x), np.where(above, x, high)
  return np.where(t > 0, x, 0) / num_tokens


def _snapping_start(num_tokens, num_classes, eta_y):
  """Solves Lemma 8 for u = (1 + omega_1) ln M by fixed-point iteration."""
  u = 2 * math.log(num_tokens)
  for _ in range(200):
    u = math.log(u * (num_tokens - 1))
  return 2 * u * num_classes / eta_y


class Figure3Test(parameterized.TestCase):

  def test_curves_are_theorem_4_from_an_independent_h(self):
    (axes,) = made_up.drawn(theory.figure3).axes
    for eta_y in (0.5, 1.0, 2.0, 5.0):
      t, chi = made_up.line(axes, rf"$\eta_Y={eta_y:g}$")
      h = _h(np.asarray(t, np.float64) / 10, 1000, eta_y)
      expected = np.sqrt(1 + 2 * (0.5 / eta_y) * 10 * (999 * h) ** 2)
      np.testing.assert_allclose(chi, expected, rtol=made_up.RTOL)
      self.assertEqual((t[0], t[-1], chi[0]), (0, 700, 1))

  def test_dashes_stand_where_attention_snaps(self):
    (axes,) = made_up.drawn(theory.figure3).axes
    for eta_y, look in figures.curve_styles((0.5, 1.0, 2.0, 5.0)).items():
      expected = _snapping_start(1000, 10, eta_y)
      (line,) = [
          line
          for line in axes.lines
          if len(line.get_xdata()) == 2 and line.get_color() == look.color
      ]
      np.testing.assert_allclose(line.get_xdata(), expected, rtol=1e-6)

  def test_caption_says_that_the_scale_is_unknown(self):
    self.assertRegex(theory.CAPTIONS["figure3"], "C_0.*cannot be pinned")


class Figure8Test(parameterized.TestCase):

  @parameterized.parameters(
      (0, 50, (0.1, 0.2, 0.5, 1.0, 2.0), 80),
      (1, 1000, (0.2, 0.5, 1.0, 2.0, 4.0), 70),
  )
  def test_steps_follow_the_recursion_and_curves_the_root(
      self, panel, num_tokens, rates, end
  ):
    axes = made_up.drawn(theory.figure8).axes[panel]
    smooth = [line for line in axes.lines if line.get_color() == "black"]
    for eta_y, curve in zip(rates, smooth, strict=False):
      s, steps = made_up.line(axes, rf"$\eta_Y={eta_y:g}$")
      h = [0.0]
      for _ in range(end):
        others = num_tokens - 1
        h.append(h[-1] + eta_y / (others + math.exp(num_tokens * h[-1])))
      np.testing.assert_allclose(steps, h, rtol=made_up.RTOL)
      np.testing.assert_array_equal(s, np.arange(end + 1))
      t = np.asarray(curve.get_xdata(), np.float64)
      self.assertEqual((t[0], t[-1]), (0, end))
      expected = _h(t, num_tokens, eta_y)
      np.testing.assert_allclose(curve.get_ydata(), expected, rtol=made_up.RTOL)
    self.assertLen(smooth, len(rates) + 1)  # And the legend's.


class Figure9Test(parameterized.TestCase):

  # Values at the right end, to three digits, for K = 1 and C0 = 1.
  @parameterized.parameters(
      (0, 10, 100, (0.620, 0.671, 0.713, 0.749, 0.783)),
      (1, 1, 10_000, (1.408, 1.450, 1.481, 1.509, 1.533)),
  )
  def test_curves_are_theorem_4_and_markers_stand_at_t0(
      self, panel, ratio, num_tokens, ends
  ):
    axes = made_up.drawn(theory.figure9).axes[panel]
    heights = []
    for eta_z, end in zip((0.5, 1.0, 2.0, 4.0, 8.0), ends, strict=True):
      (line,) = made_up.lines(axes, rf"$\eta_Z={eta_z:g}$")
      np.testing.assert_allclose(line.get_ydata()[-1], end, atol=6e-4)
      t = np.asarray(line.get_xdata(), np.float64)
      h = _h(t, num_tokens, ratio * eta_z)
      expected = np.log1p(2 / ratio * ((num_tokens - 1) * h) ** 2) / 4
      np.testing.assert_allclose(line.get_ydata(), expected, rtol=made_up.RTOL)
      (marked,) = line.get_markevery()
      np.testing.assert_allclose(
          line.get_xdata()[marked],
          _snapping_start(num_tokens, 1, ratio * eta_z),
          rtol=1e-6,
      )
      heights.append(line.get_ydata()[marked])
      self.assertTrue((np.diff(line.get_xdata()) >= 0).all())
    # B_n(t0) depends on K, M and eta_Y / eta_Z alone.
    np.testing.assert_allclose(heights, heights[0], rtol=made_up.RTOL)


if __name__ == "__main__":
  absltest.main()
