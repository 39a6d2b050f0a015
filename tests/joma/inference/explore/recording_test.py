from absl.testing import absltest
import numpy as np

from joma.inference.explore import recording


def _attention(received):
  """Of one head; what is not asked for is nothing."""
  none = np.zeros(0)
  return recording.Attention(
      *(none,) * 3, np.array(received, float)[None, None], *(none,) * 4
  )


class RecordingTest(absltest.TestCase):

  def test_sinks_and_heavy_hitters_by_hand(self):
    received = np.ones(40) * 0.5
    received[[0, 7, 9, 30]] = 12.1, 3, 2, 2.5
    attention = _attention(received)
    self.assertEqual(np.flatnonzero(attention.sinks()).tolist(), [0])
    # A twentieth of forty, the sink aside.
    self.assertEqual(np.flatnonzero(attention.heavy()).tolist(), [7, 30])
    received[0] = 12  # .3 of all: no more than the threshold.
    attention = _attention(received)
    self.assertFalse(attention.sinks().any())
    self.assertEqual(np.flatnonzero(attention.heavy()).tolist(), [0, 7])


if __name__ == "__main__":
  absltest.main()
