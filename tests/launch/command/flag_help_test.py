"""The help of every flag stands alone: --help lists flags by the alphabet."""

import ast
import pathlib
import re

from absl.testing import absltest
from absl.testing import parameterized

_ROOT = pathlib.Path(__file__).parents[3]
# Words that point to a flag which stands elsewhere in the list, or nowhere.
_FRAGMENT = re.compile(
    r"(Of|Its?|The same|As|Them|They|Their|Those|These|This|That|Such|So|Same"
    r"|What follows|Between|Under|Likewise|Also|Ditto|Else|And|Or)\b"
)


def complaints(texts):
  """Lists the helps that begin with a fragment or are a single word."""
  return [
      f"{name}: {text}"
      for name, text in texts
      if _FRAGMENT.match(text) or " " not in text
  ]


def field_helps(tree):
  """Yields name and help of the fields of every class ...Config."""
  for node in ast.walk(tree):
    if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
      _, _, section = (ast.get_docstring(node) or "").partition("Attributes:\n")
      for entry in re.findall(r"^  (\w+): ((?:.|\n    )*)", section, re.M):
        yield f"{node.name}.{entry[0]}", " ".join(entry[1].split())


def flag_helps(tree):
  """Yields name and help of every flags.DEFINE_...("name", default, "help")."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
      texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
      texts = [text for text in texts if isinstance(text, str)]
      if node.func.attr.startswith("DEFINE_") and len(texts) > 1:
        yield texts[0], texts[-1]


class FlagHelpTest(parameterized.TestCase):

  def test_every_help_stands_alone(self):
    helps = []
    for package in ("scansnap_jax", "joma", "launch"):
      for path in sorted((_ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text())
        for name, text in (*field_helps(tree), *flag_helps(tree)):
          helps.append((f"{path.relative_to(_ROOT)} {name}", text))
    self.assertGreater(len(helps), 350)
    found = complaints(helps)
    self.assertEmpty(found, "\n".join(found))

  @parameterized.parameters(
      "Of the draws.",
      "Its width.",
      "The same for the MLPs; None is lr.",
      "As above.",
      "Them, in pairs.",
      "V.",
  )
  def test_a_fragment_is_seen(self, text):
    self.assertNotEmpty(complaints([("name", text)]))

  def test_reads_fields_over_several_lines_and_flags(self):
    source = '''
class SomeConfig:
  """Settings.

  Attributes:
    first: One line.
    second: Two
      lines.
  """

A = flags.DEFINE_string("third", None, "A flag.")
'''
    tree = ast.parse(source)
    self.assertEqual(
        [*field_helps(tree)],
        [
            ("SomeConfig.first", "One line."),
            ("SomeConfig.second", "Two lines."),
        ],
    )
    self.assertEqual([*flag_helps(tree)], [("third", "A flag.")])


if __name__ == "__main__":
  absltest.main()
