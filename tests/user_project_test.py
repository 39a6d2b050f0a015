"""A project of a user's own, beside the wheel that pip installs.

Its folder holds a launch.py and a folder launch/, as many do: `scansnap` runs
there all the same, and mypy and pyright see this project's types.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv

from absl.testing import absltest
import pytest

_ROOT = pathlib.Path(__file__).parents[1]
# The last line is wrong; those above are right, and no type in them is Any.
_USE = """
from scansnap_jax import config
from scansnap_jax.experiment import json_file

settings: config.ScanSnapConfig = config.figure4()
steps: int = settings.num_steps
paths: list[str] = json_file.split_paths("a,b")
wrong: str = settings.num_steps
"""
_WRONG = 8
_FILES = {
    "launch.py": "raise SystemExit('the user has started his own')\n",
    "launch/__init__.py": "",
    "launch/__main__.py": "raise SystemExit('the user has started his own')\n",
    "use.py": _USE,
    "mypy.ini": (
        "[mypy]\nstrict = True\nwarn_return_any = False\n"
        "[mypy-jax.*,numpy.*,flax.*,optax.*]\nfollow_imports = skip\n"
    ),
    "pyrightconfig.json": (
        '{"include": ["use.py"], "typeCheckingMode": "basic"}'
    ),
}


@pytest.mark.slow
class UserProjectTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(
        cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    cls.python = _install(_wheel(cls.folder), cls.folder / "venv")
    cls.project = cls.folder / "project"
    for name, text in _FILES.items():
      path = cls.project / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)

  def _run(self, *command, status=0):
    """Output of a command in the project's folder."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=self.project,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    self.assertEqual(done.returncode, status, done.stdout + done.stderr)
    return done.stdout

  def test_it_is_the_wheel_that_is_tried(self):
    code = "import joma; print(joma.__file__)"
    found = self._run(self.python, "-P", "-c", code)
    self.assertStartsWith(found, str(self.folder / "venv"))

  def test_commands_run_beside_a_launch_of_the_users_own(self):
    scansnap = self.python.parent / "scansnap"
    self.assertIn("train_lm", self._run(scansnap))
    self.assertIn("h2o", self._run(scansnap, "cost_table", "--chips=v5e"))
    self._run(scansnap, "scansnap", "--preset=smoke", "--workdir=runs/a")
    self.assertTrue((self.project / "runs/a/report.html").is_file())

  def test_mypy_sees_the_types(self):
    mypy = _tool("mypy")
    found = self._run(
        mypy, f"--python-executable={self.python}", "use.py", status=1
    )
    errors = [line for line in found.splitlines() if ": error:" in line]
    self.assertLen(errors, 1, found)
    self.assertStartsWith(errors[0], f"use.py:{_WRONG}: error: Incompatible")

  def test_pyright_sees_the_types(self):
    pyright = _tool("pyright")
    found = self._run(pyright, f"--pythonpath={self.python}", status=1)
    errors = [line for line in found.splitlines() if " - error:" in line]
    self.assertLen(errors, 1, found)
    self.assertIn(f"use.py:{_WRONG}:", errors[0])


def _wheel(folder):
  """Builds the wheel of a copy of the tree, which stays as it is."""
  copy = folder / "tree"
  copy.mkdir()
  for name in ("scansnap_jax", "joma", "kernels_pallas", "launch"):
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(_ROOT / name, copy / name, ignore=skipped)
  (copy / "docs").mkdir()
  for name in ("pyproject.toml", "LICENSE", "docs/package.md"):
    shutil.copy(_ROOT / name, copy / name)
  options = ("--no-deps", "--quiet")  # pip fetches the setuptools it wants.
  _pip(sys.executable, "wheel", *options, f"--wheel-dir={folder}", copy)
  (wheel,) = folder.glob("*.whl")
  return wheel


def _install(wheel, folder):
  """A new environment that has the wheel, beside what is installed here."""
  venv.create(folder, with_pip=False)
  python = folder / "bin" / "python"
  where = sysconfig.get_path("purelib", vars={"base": str(folder)})
  # A plain path: files *.pth in it, as of an editable copy, are not read.
  here = sysconfig.get_path("purelib")
  (pathlib.Path(where) / "beside.pth").write_text(here + "\n")
  options = ("--no-deps", "--no-index", "--quiet", "--ignore-installed")
  _pip(python, "install", *options, wheel)
  return python


def _pip(python, *arguments):
  subprocess.run([python, "-m", "pip", *arguments], check=True)


def _tool(name):
  beside = pathlib.Path(sys.executable).parent / name
  found = str(beside) if beside.exists() else shutil.which(name)
  if found is None:
    raise absltest.unittest.SkipTest(f"needs {name}: the extra [lint]")
  return found


if __name__ == "__main__":
  absltest.main()
