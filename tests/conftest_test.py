import datetime
import hashlib
import pathlib
import subprocess
import sys

from absl.testing import absltest
import pytest

_FILE = """
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("number", range(40))
def test_slow(number):
  del number
"""


class SlowTenthTest(absltest.TestCase):

  def _collected(self, *args):
    """Names of the slow tests that a run with these flags would take."""
    root = pathlib.Path(__file__).parents[1]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--collect-only"),
            *("-m", "slow", "-p", "no:cacheprovider", "-c"),
            *(str(root / "pyproject.toml"), "--rootdir", str(self.folder)),
            *("--confcutdir", str(self.folder), str(self.folder), *args),
        ],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    self.assertIn(run.returncode, (0, 5), run.stdout + run.stderr)
    return {line for line in run.stdout.splitlines() if "::test_slow" in line}

  @pytest.mark.slow
  def test_a_tenth_is_by_the_hash_of_names_and_today_has_one(self):
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    conftest = pathlib.Path(__file__).with_name("conftest.py").read_text()
    (self.folder / "conftest.py").write_text(conftest)
    (self.folder / "some_test.py").write_text(_FILE)
    names = [f"some_test.py::test_slow[{number}]" for number in range(40)]
    tenth = lambda n: {
        name
        for name in names
        if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == n
    }
    self.assertEqual(self._collected("--slow_tenth=3"), tenth(3))
    days = [datetime.date.today().toordinal() % 10]
    found = self._collected("--slow_tenth=auto")
    days.append(datetime.date.today().toordinal() % 10)  # It may be midnight.
    self.assertIn(found, [tenth(day) for day in days])


if __name__ == "__main__":
  absltest.main()
