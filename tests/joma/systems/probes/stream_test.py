from absl.testing import absltest
import numpy as np

from joma.systems.probes import stream


class SecondarySinksTest(absltest.TestCase):

  def _resid(self, cosine):
    """Token 9 is like the first from boundary 4 for 3; a rise at 2, fall at 8.

    Tokens are orthogonal otherwise.
    """
    resid = np.tile(np.eye(12)[None], (10, 1, 1))
    resid[2:8, 0] *= 50
    resid[4:7, 9] = 20 * cosine * np.eye(12)[0]
    resid[4:7, 9] += 20 * np.sqrt(1 - cosine**2) * np.eye(12)[9]
    return resid

  def test_a_planted_sink_is_found_exactly_and_a_near_miss_is_not(self):
    found = stream.secondary_sinks(self._resid(0.95))
    self.assertEqual(found, [stream.SecondarySink(9, 4, 3)])
    self.assertEqual(
        stream.secondary_sinks(self._resid(-0.95)),
        [stream.SecondarySink(9, 4, 3)],
    )
    self.assertEmpty(stream.secondary_sinks(self._resid(0.85)))

  def test_the_first_three_and_what_is_outside_do_not_count(self):
    resid = self._resid(0.0)
    resid[2:8, 2] = resid[2:8, 0]
    resid[8:, 9] = resid[8:, 0]  # After the fall.
    self.assertEmpty(stream.secondary_sinks(resid))


if __name__ == "__main__":
  absltest.main()
