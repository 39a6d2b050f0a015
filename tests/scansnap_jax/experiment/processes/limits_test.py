import pathlib
import resource
import subprocess
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from scansnap_jax.experiment.processes import limits

_ROOT = pathlib.Path(__file__).parents[4]
_GIB = 1 << 30


class MemoryTest(parameterized.TestCase):

  def _limits(self, own, files):
    """A tree of control groups as Linux shows it, and the file of a process."""
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / "own").write_text(own)
    for name, text in files.items():
      path = folder / "groups" / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
    return folder / "groups", folder / "own"

  @parameterized.named_parameters(
      (
          "version 2, of a group that holds the process's own",
          "0::/slurm/job_7/step_0\n",
          {
              "slurm/job_7/step_0/memory.max": "max\n",
              "slurm/job_7/memory.max": "1073741824\n",
              "slurm/memory.max": "2147483648\n",
          },
      ),
      (
          "version 2, in a container",
          "0::/../outside\n",
          {"memory.max": "1073741824\n"},
      ),
      (
          "version 1, beside other controllers",
          "5:cpu,cpuacct:/a\n4:memory:/docker/ab:c\n0::/\n",
          {
              "memory/docker/ab:c/memory.limit_in_bytes": "1073741824\n",
              "memory/memory.limit_in_bytes": "9223372036854771712\n",
              "cpu,cpuacct/a/memory.limit_in_bytes": "1\n",
          },
      ),
  )
  def test_a_control_group_is_the_least_limit(self, own, files):
    found, holder = limits.memory(*self._limits(own, files))
    self.assertEqual(found, _GIB)
    self.assertEqual(holder, "this container or job has")

  @parameterized.parameters("", "0::/\n", "no colons", "0::/a\n")
  def test_without_a_limit_it_is_that_of_the_machine(self, own):
    files = {"memory.max": "max\n", "a/memory.max": "unreadable\n"}
    with mock.patch.object(
        resource, "getrlimit", return_value=(resource.RLIM_INFINITY,) * 2
    ):
      found, holder = limits.memory(*self._limits(own, files))
    self.assertEqual(holder, "this machine has")
    self.assertGreater(found, _GIB)

  def test_addresses_count(self):
    with mock.patch.object(resource, "getrlimit", return_value=(3, 4)):
      self.assertEqual(
          limits.memory(*self._limits("", {})),
          (3, "`ulimit -v` lets a process have"),
      )


class SettleTest(absltest.TestCase):

  def test_too_few_addresses_are_one_line(self):
    """Python starts in 300 MB; numpy alone does not."""
    script = f"ulimit -v 300000; exec {sys.executable} -m launch.cost_table"
    ended = subprocess.run(
        ["bash", "-c", script], cwd=_ROOT, capture_output=True, text=True
    )
    self.assertEqual(ended.returncode, 2, ended.stderr)
    self.assertEqual(
        ended.stderr,
        "error: `ulimit -v` lets a process have 0.3 GiB of addresses; at least"
        " 2.5 GiB are needed to start.\n",
    )


if __name__ == "__main__":
  absltest.main()
