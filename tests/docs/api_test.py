"""Every public name has a place in the API pages, and a docstring."""

import ast
import functools
import importlib
import importlib.util
import inspect
import pathlib
import re

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from docs.ext import api
from docs.ext import docstrings

_ROOT = pathlib.Path(__file__).parents[2]
_needs_sphinx = pytest.mark.skipif(
    importlib.util.find_spec("sphinx") is None, reason="wants the extra docs"
)
# A policy's overrides say what they do on their base class.
_INHERITED = re.compile(r"joma\.systems\.cache_policies\.")


@functools.cache
def _pages():
  return api.pages(api.modules(_ROOT))


class ApiTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.modules = api.modules(_ROOT)
    cls.names = api.public_names(cls.modules)

  @_needs_sphinx
  def test_every_file_has_a_place(self):
    files = [
        path
        for package in api.PACKAGES
        for path in _ROOT.glob(f"{package}/**/*.py")
        if path.name != "__main__.py"  # What a folder runs, not what it gives.
    ]
    self.assertEqual(len(self.modules), len(files))
    pages = _pages()
    text = "\n".join(pages.values())
    placed = re.findall(r"^\.\. py:module:: (\S+)$", text, re.MULTILINE)
    self.assertCountEqual(placed, [module.name for module in self.modules])

  @_needs_sphinx
  def test_every_name_is_on_a_page(self):
    text = "\n".join(_pages().values())
    directives = re.findall(r"^ *\.\. py:\w+:: ", text, re.MULTILINE)
    self.assertEqual(len(directives), len(self.names))

  def test_every_name_has_a_docstring(self):
    bare = [
        name
        for name, node in self.names.items()
        if not ast.get_docstring(node)
        and not (_INHERITED.match(name) and isinstance(node, ast.FunctionDef))
    ]
    self.assertEmpty(bare)

  @parameterized.parameters(
      "scansnap_jax.dynamics",
      "joma.inference.compression",
      "joma.transformer.hooks",
      "kernels_pallas.attention.api",
  )
  def test_names_are_those_that_an_import_gives(self, name):
    module = importlib.import_module(name)
    imported = {
        f"{name}.{key}"
        for key, value in vars(module).items()
        if not key.startswith("_")
        and getattr(value, "__module__", None) == name
        and (inspect.isclass(value) or callable(value))
        and getattr(value, "__name__", None) == key
    }
    found = {full for full in self.names if full.rpartition(".")[0] == name} - {
        module.name for module in self.modules
    }
    self.assertEqual(found, imported)

  @_needs_sphinx
  def test_signatures_show_shapes_and_link_names(self):
    page = _pages()["joma.inference"]
    start = page.index(".. py:function:: compress(")
    line = page[start:].splitlines()[0]
    self.assertIn("keys: Float[Array, 'B S K H']", line)
    self.assertIn("-> ~joma.inference.compression.Kept", line)
    self.assertIn("rotate: ~joma.transformer.hooks.Rotate | None=None", line)


class DocstringsTest(parameterized.TestCase):

  @parameterized.parameters(
      ("a `b` c", "a ``b`` c"),
      ("P(l|n) and *args", r"P(l\|n) and \*args"),
      ("`x`s, v_", r"``x``\ s, v\_"),
      ("`one\n  name`", "``one name``"),
  )
  def test_signs_mean_themselves(self, text, expected):
    self.assertEqual(docstrings.escaped(text), expected)

  def test_what_is_aligned_stays_aligned(self):
    lines = docstrings.to_rst("Sum.\n\n  z = x\n\nx     a number\n", "module")
    self.assertEqual(
        [line for line in lines if line],
        [
            "Sum.",
            ".. code-block:: text",
            "     z = x",
            ".. code-block:: text",
            "   x     a number",
        ],
    )

  @_needs_sphinx
  def test_sections_are_fields(self):
    doc = (
        "Adds.\n\nArgs:\n  x: A number,\n    of `any` kind.\n\nRaises:\n "
        " ValueError: If not\n    so.\n"
    )
    lines = docstrings.to_rst(doc, "function")
    self.assertIn(":param x: A number,", lines)
    self.assertIn("          of ``any`` kind.", lines)
    self.assertIn(":raises ValueError: If not", lines)


if __name__ == "__main__":
  absltest.main()
