"""Starts of scripts, on processes whose times are known."""

import os
import pathlib

from absl.testing import absltest
import pytest

from launch import __main__ as launcher
from launch.bench.starts import __main__ as starts
from launch.bench.starts import commands
from launch.bench.starts import watched
from scansnap_jax.experiment import errors

# Says one line at once and one after .3 s, and is busy for .2 s at least.
_SHOW = """
import sys, time
print("one", flush=True)
time.sleep(.3)
until = time.process_time() + .2
while time.process_time() < until:
  pass
print("two", file=sys.stderr)
"""


class CommandsTest(absltest.TestCase):

  def test_every_script_has_its_command(self):
    whole = {
        name
        for name, path in launcher.scripts().items()
        if not name.startswith("bench")
    }
    # Parts of `plan`, which compile or count as it does.
    whole -= {"plan.scaling", "plan.offload"}
    self.assertEqual(set(commands.NAMES), whole)

  def test_a_start_writes_into_its_own_place(self):
    self.assertIn("--out=a_1", commands.arguments("export", "a_1"))
    for name in commands.NAMES:
      for argument in commands.arguments(name, "own"):
        self.assertNotRegex(argument, r"[{}]")

  def test_another_name_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "scripts=abacus is none of"):
      starts.StartsConfig(scripts=("train_lm", "abacus"))


class WatchedTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def _start(self, *arguments):
    return watched.start(arguments, self.folder, os.environ)

  def test_times_and_lines_of_a_known_process(self):
    found = self._start("-c", _SHOW)
    self.assertEqual(found.said, "one\ntwo\n")
    self.assertGreaterEqual(found.cpu_seconds, 0.2)
    self.assertGreaterEqual(found.silence_s, 0.5)
    self.assertGreaterEqual(found.seconds, found.silence_s)

  def test_a_failure_is_said_again(self):
    program = "import sys; print('error: no such thing'); sys.exit(3)"
    with self.assertRaisesRegex(errors.UserError, "ended with 3: no such thi"):
      self._start("-c", program)


class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_programs_of_the_first_start_are_there_at_the_second(self):
    config = starts.StartsConfig(scripts=("generate", "cost_table"))
    generate, cost_table = starts.measure(config)["starts"]
    self.assertGreater(generate["programs"], 0)
    self.assertGreater(generate["mb"], 0)
    self.assertLess(generate["second_cpu_s"], generate["first_cpu_s"])
    self.assertEqual(cost_table["programs"], 0)  # It computes in NumPy.

  def test_a_cache_of_the_environment_is_left_out(self):
    ours = {"JAX_COMPILATION_CACHE_DIR": "x", "PYTHONPATH": "y", "HOME": "z"}
    found = starts._environment(ours)
    self.assertEqual(set(found), {"PYTHONPATH", "HOME"})
    self.assertEndsWith(found["PYTHONPATH"], f"{os.pathsep}y")


if __name__ == "__main__":
  absltest.main()
