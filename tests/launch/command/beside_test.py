import threading

from absl.testing import absltest
from absl.testing import parameterized

from launch.command import beside as beside_lib


class OneThreadTest(parameterized.TestCase):

  def test_what_has_not_begun_when_a_run_ends_is_dropped(self):
    begun, end = threading.Event(), threading.Event()

    def first():
      begun.set()
      end.wait(timeout=5)

    with self.assertRaisesRegex(RuntimeError, "diverged"):
      with beside_lib.one_thread() as beside:
        running, waiting = beside.submit(first), beside.submit(self.fail)
        begun.wait()
        # The first ends while the context does, which drops the other before.
        waiting.add_done_callback(lambda _: end.set())
        raise RuntimeError("diverged")
    self.assertTrue(running.done())
    self.assertTrue(waiting.cancelled())


if __name__ == "__main__":
  absltest.main()
