import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp

from scansnap_jax.experiment import errors
from scansnap_jax.experiment.processes import profiling


class ProfilingTest(parameterized.TestCase):

  @parameterized.parameters("5", "5:5", "7:5", "a:5", "1:2:3", "-1:3", "")
  def test_what_is_no_range_of_steps_is_refused(self, text):
    with self.assertRaisesRegex(errors.UserError, "as 100:150"):
      profiling.parse(text)

  def test_the_programs_of_its_steps_are_traced_and_no_others(self):
    folder = pathlib.Path(self.create_tempdir().full_path) / "profile"
    seen = []
    with profiling.Profiler(profiling.parse("5:9"), folder) as profiler:
      for start in range(0, 16, 4):
        profiler.begin(start, start + 4)
        seen.append(profiler._is_on)
        jnp.arange(start + 1).sum().block_until_ready()
        profiler.finish(start + 4)
    self.assertEqual(seen, [False, True, True, False])
    self.assertLen(list(folder.rglob("*.xplane.pb")), 1)

  def test_a_run_that_ends_before_writes_what_there_is(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    with profiling.Profiler((0, 100), folder) as profiler:
      profiler.begin(0, 4)
    self.assertLen(list(folder.rglob("*.xplane.pb")), 1)


if __name__ == "__main__":
  absltest.main()
