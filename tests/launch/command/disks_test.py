"""Disks that are full, read-only or gone under a run: one line, nothing lost.

The disk is one of a process's own mount namespace, which takes no root where
users may have such; elsewhere the tests are skipped.
"""

import functools
import os
import pathlib
import re
import subprocess
import sys
import textwrap

from absl.testing import absltest
from absl.testing import parameterized
import pytest

_ROOT = pathlib.Path(__file__).parents[3]
_RUN = (
    f"{sys.executable} -m launch.scansnap --preset=sweep --num_steps=40"
    " --log_every=5 --checkpoint_every=5 --num_seeds=1 --batch_size=16"
    " --lr_z=1 --num_cpu_devices=1"
)
# Long enough to be met while it runs.
_LONG = _RUN.replace("--num_steps=40", "--num_steps=1000000")
_WAIT = """
for i in $(seq 600); do
  ls -d run/checkpoints/*/*/*[0-9]/digest >/dev/null 2>&1 && break
  kill -0 $! 2>/dev/null || break; sleep .1
done
"""


@functools.cache
def _can_mount():
  command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/tmp"]
  try:
    return not subprocess.run(command, capture_output=True).returncode
  except OSError:
    return False


class DisksTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    if not _can_mount():
      self.skipTest("no mount namespace may be made here")

  def shell(self, kilobytes, script):
    """Runs a script in a disk of this size; returns what it printed."""
    disk = self.create_tempdir().full_path
    mount = f"mount -t tmpfs -o size={kilobytes}k none {disk}; cd {disk}\n"
    return subprocess.run(
        ["unshare", "-rm", "bash", "-c", mount + textwrap.dedent(script)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=550,
        check=False,
    ).stdout

  def check_one_line(self, said):
    """One error, status 2, and then the same command goes on and ends."""
    first, then = said.split("AGAIN\n")
    self.check_one_error(first)
    self.assertNotIn("Traceback", then)
    self.assertEndsWith(then, "status 0\n")
    return first, then

  def check_one_error(self, said):
    self.assertRegex(said, r"(?m)^error: .*\nstatus 2$")
    self.assertNotIn("Traceback", said)
    self.assertLessEqual(len(said.strip().splitlines()), 6, said)

  # It fills up at another moment in each.
  @parameterized.parameters(8, 30, 48, 64, 80, 100, 120, 140, 160, 180)
  @pytest.mark.slow
  def test_a_full_disk(self, kilobytes):
    said = self.shell(
        kilobytes,
        f"""
        {_RUN} --workdir=run; echo status $?
        ls run/checkpoints/*/*/ 2>&1 | tr '\\n' ' '
        mount -o remount,size=64m .; echo; echo AGAIN
        {_RUN} --workdir=run; echo status $?
        """,
    )
    first, then = self.check_one_line(said)
    # The last step that is whole is the one that it goes on from.
    steps = [int(step) for step in re.findall(r"\b(\d+)(?= )", first)]
    if any("goes on from step" in line for line in then.splitlines()):
      (step,) = re.findall(r"goes on from step (\d+)", then)
      self.assertIn(int(step), steps)

  @pytest.mark.slow
  def test_a_folder_that_becomes_read_only(self):
    said = self.shell(
        65536,
        f"""
        {_LONG} --workdir=run & {_WAIT}
        mount --bind run run; mount -o remount,ro,bind run
        wait $!; echo status $?
        umount run; echo AGAIN
        kept=$(ls run/checkpoints/*/* | grep -c '^[0-9]*$')
        {_LONG} --workdir=run 2> said &
        for i in $(seq 600); do grep -q 'goes on' said && break; sleep .1; done
        kill -TERM $!; wait $!; [ $? = 143 ] && [ $kept -ge 1 ]; status=$?
        cat said; echo status $status
        """,
    )
    _, then = self.check_one_line(said)
    self.assertRegex(then, "goes on from step [1-9]")

  @pytest.mark.slow
  def test_a_folder_that_is_removed(self):
    said = self.shell(
        65536,
        f"""
        {_LONG} --workdir=run & {_WAIT}
        rm -rf run; wait $!; echo status $?
        """,
    )
    self.check_one_error(said)


if __name__ == "__main__":
  absltest.main()
