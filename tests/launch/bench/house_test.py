"""Figures of a made-up tree, each counted by hand."""

import pathlib
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized

from launch.bench import house
from launch.bench import sources

_ROOT = pathlib.Path(__file__).parents[3]
# 16 lines, 3 of them comments alone; 4 annotations, one of them Any.
_MAIN = '''"""About h2o, which docstrings may name."""
from typing import Any
# A comment.
import joma.other

class Kind:
  size: int = 3  # Not alone.
  def __call__(self, x: Any) -> int:
    return x
  @staticmethod
  def make(a, *rest: int):
    # Another.
    return a
def _hide(x, y): return (
    x, y)
  # The last one.
'''
# 8 lines; 4 annotations, one of them Any.
_OTHER = """def bump(x: int, *, y: "Any", z) -> "int":
  def inner(k: float):
    return k
  return inner(x)
def late():
  from joma import main
  return main
POLICY = "h2o:score=ema"
"""
_POLICIES = 'POLICIES: dict[str, str] = {"h2o": "by.h2o:H2O", "full": "f:Full"}'
_SYSTEMS = 'SYSTEMS: dict[str, str] = {"hip": "joma.systems.hip:Hip"}'
_FILES = {
    "joma/__init__.py": '"""Docstring."""\n',
    "joma/main.py": _MAIN,
    "joma/other.py": _OTHER,
    "joma/systems/names.py": f'{_SYSTEMS}\nOLD = "h2o"\n',
    "joma/systems/hip.py": 'class Hip: name = "hip"\n',
    "joma/systems/cache_policies/names.py": (
        f'WRAPPERS: dict[str, str] = {{"adakv": "own.ada:Ada"}}\n{_POLICIES}\n'
    ),
    "launch/uses.py": "from joma.systems.hip import Hip\n\nmade = Hip\n",
    "tests/a_test.py": "x = 1\n" * 5,
}
# By label, as a reader counts them in the texts above.
_EXPECTED = {
    "lines of the product": "33",
    "lines of launch": "3",
    "lines of tests": "5",
    "files of the product": "6",
    "files a folder, max": "2 (joma)",
    "files a folder of tests, max": "1 (tests)",
    "folders above 14 files": "0",
    # 1, 2, 2, 3, 8 and 16 lines.
    "file lines, median / p90 / max": "2.5 / 16 / 16",
    "files above 400 lines": "0",
    # bump 4, inner 2, late 3, __call__ 2, make 3, _hide 2.
    "function lines, median / p90 / max": "2.5 / 4 / 4",
    "functions above 50 lines": "0",
    "those above without their docstring": "0",
    # x of __call__; rest, not a, of make; x and y, not z, of bump.
    "annotated parameters, public": "66.7 %",
    # k of inner, not x and y of _hide.
    "annotated parameters, private": "33.3 %",
    # Two of 4 + 4, and 3 of the tables.
    "bare Any, of annotations": "18.2 %",
    "comment lines per 100": "9.1",
    "import cycles": "1",
    # h2o by other.py, hip by uses.py.
    "names in other files, sum over names": "2",
    "names in other files, largest": "1",
}


def _write(folder, files):
  for name, text in files.items():
    path = pathlib.Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return pathlib.Path(folder)


class FiguresTest(parameterized.TestCase):

  def test_every_figure_is_that_of_a_count_by_hand(self):
    root = _write(self.create_tempdir().full_path, _FILES)
    found = house.figures(house.survey(root, house.systems(root)))
    self.assertEqual(found, _EXPECTED)

  def test_what_stands_out_is_said(self):
    files = _FILES | {f"joma/many/f{i}.py": "" for i in range(15)}
    files |= {
        "joma/long.py": "x = 1\n" * 401,
        "tests/long_test.py": "x = 1\n" * 402,
        "launch/big.py": "class A:\n  def f(self):\n" + "    pass\n" * 50,
        "launch/says.py": 'def f():\n  """A.' + "\n" * 50 + '"""\n  return 1\n',
        "launch/takes.py": "def f(hip): raise ValueError('hip')\n",
        "launch/has.py": "class A:\n  hip: int\n  names = 'hip',\n",
    }
    root = _write(self.create_tempdir().full_path, files)
    found = house.survey(root, house.systems(root))
    self.assertEqual(
        list(house.details(found)),
        [
            "joma/many has 15 files",
            "joma/long.py has 401 lines",
            "tests/long_test.py has 402 lines",
            "launch/big.py:2 A.f has 51 lines",
            "launch/says.py:1 f has 53 lines, 51 of them its docstring",
            "cycle: joma.main, joma.other",
            "hip is named by launch/uses.py",
            "h2o is named by joma/other.py",
        ],
    )
    figures = house.figures(found)
    self.assertEqual(figures["folders above 14 files"], "1")
    self.assertEqual(figures["files above 400 lines"], "1")
    self.assertEqual(figures["functions above 50 lines"], "2")
    self.assertEqual(figures["those above without their docstring"], "1")

  def test_what_is_at_its_limit_does_not_stand_out(self):
    files = {f"joma/f{i}.py": "x = 1\n" * 400 for i in range(14)}
    files["joma/__init__.py"] = ""
    files["launch/f.py"] = "def f():\n" + "  pass\n" * 49
    root = _write(self.create_tempdir().full_path, files)
    self.assertEmpty(list(house.details(house.survey(root, []))))

  @parameterized.parameters(
      ([7], "7 / 7 / 7"),
      (range(1, 11), "5.5 / 9 / 10"),
      (range(11, 0, -1), "6 / 10 / 11"),
      ([], "none"),
  )
  def test_spread(self, numbers, expected):
    self.assertEqual(house.spread(numbers), expected)

  def test_modules_that_share_no_cycle_are_apart(self):
    pairs = {"a": "b", "b": "a", "c": "d", "d": "c", "e": "a", "f": "f"}
    files = {
        f"joma/{name}.py": f"import joma.{other}\n"
        for name, other in pairs.items()
    }
    root = _write(self.create_tempdir().full_path, files)
    self.assertEqual(
        sources.cycles(sources.read(root, ["joma"])),
        [["joma.a", "joma.b"], ["joma.c", "joma.d"], ["joma.f"]],
    )


class ScriptTest(absltest.TestCase):

  def test_this_tree_is_known_and_has_a_column_beside_another(self):
    known = house.systems(_ROOT)
    self.assertIn(house.System("h2o", "h2o", "H2O"), known)
    self.assertNotIn("window", [system.name for system in known])
    root = _write(self.create_tempdir().full_path, _FILES)
    other = _write(self.create_tempdir().full_path, {"joma/a.py": "x = 1\n"})
    command = (sys.executable, "-m", "launch.bench.house")
    output = subprocess.run(
        [*command, f"--root={other}", f"--root={root}"],
        capture_output=True,
        check=True,
        cwd=_ROOT,
        text=True,
    ).stdout.splitlines()
    self.assertEqual(output[0], f"| figure | {other} | {root} |")
    self.assertEqual(output[2], "| lines of the product | 1 | 33 |")
    self.assertEqual(output[-1], "- h2o is named by joma/other.py")


if __name__ == "__main__":
  absltest.main()
