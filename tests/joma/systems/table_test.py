"""The table of docs/attention_systems.md has a row for every system."""

import pathlib
import re
import sys

from absl.testing import absltest
from absl.testing import parameterized

from joma.systems import names
from joma.transformer import layer_hooks
from launch import attention

_ROOT = pathlib.Path(__file__).parents[3]
_PAGE = _ROOT / "docs/attention_systems.md"
_HEAD = (
    "name | paper | file | hooks | cost | kernels | identity |"
    " study and outcome"
)


def rows(page):
  """Cells of the table's rows, by the name in the first."""
  table = page.partition(f"| {_HEAD} |\n")[2].partition("\n\n")[0]
  lines = [line.strip("|").split(" | ") for line in table.splitlines()[1:]]
  return {cells[0].strip(" `"): [c.strip() for c in cells] for cells in lines}


def hooks_of(system):
  """Its protocols; a mixer's own choice of keys is no selector."""
  kinds = [
      kind
      for kind, protocol in layer_hooks._PROTOCOLS.items()
      if isinstance(system, protocol)
  ]
  return [k for k in kinds if k != "select" or "mixer" not in kinds]


class TableTest(parameterized.TestCase):

  def test_names_are_those_of_the_list(self):
    self.assertEqual(sorted(rows(_PAGE.read_text())), sorted(names.SYSTEMS))

  @parameterized.parameters(*sorted(names.SYSTEMS))
  def test_a_row_says_what_the_system_is(self, name):
    cells = rows(_PAGE.read_text())[name]
    self.assertLen(cells, len(_HEAD.split(" | ")))
    _, paper, file, hooks, *told, study = cells
    _, kernels, _ = told
    kind = names.load(name)
    self.assertIn(kind.paper, paper)
    self.assertEqual(f"joma/systems/{file.strip('`')}", _file(kind))
    self.assertCountEqual(hooks.split(", "), hooks_of(kind()))
    # What runs on XLA only says so where it is defined, too.
    said = " ".join((sys.modules[kind.__module__].__doc__ or "").split())
    self.assertEqual("XLA only" in kernels, "XLA only" in said)
    for cell in told:
      self.assertGreater(len(cell), 2, cells)
    known = {f"`{each}`" for each in attention._STUDIES}
    named = set(re.findall(r"^`\w+`|(?<=[,;] )`\w+`", study)) & known
    self.assertTrue(named or study.startswith("none; "), study)


def _file(kind):
  return kind.__module__.replace(".", "/") + ".py"


if __name__ == "__main__":
  absltest.main()
