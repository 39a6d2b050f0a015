"""Every planted fault is in one place, and its tests fail by it."""

import pathlib

from absl.testing import absltest
import pytest

from tests.alterations import apply

_LEAST = 180


class RowsTest(absltest.TestCase):

  def test_each_text_stands_in_its_file_once(self):
    for row in apply.rows():
      path = apply.ROOT / row.path
      self.assertTrue(path.exists(), row.name)
      self.assertEqual(path.read_text().count(row.before), 1, row.name)
      self.assertNotEqual(row.before, row.after, row.name)
      self.assertTrue(row.why and row.before, row.name)

  def test_each_names_tests_that_are_there(self):
    for row in apply.rows():
      texts = ""
      for place in row.places:
        path, *classes = place.split("::")
        texts += (apply.ROOT / path).read_text()
        for name in classes:
          self.assertIn(f"class {name}(", texts, row.name)
      self.assertNotEmpty(row.names, row.name)
      for name in row.names:
        self.assertIn(f"def {name}(", texts, row.name)

  def test_they_are_many_and_each_its_own(self):
    rows = apply.rows()
    self.assertGreaterEqual(len(rows), _LEAST)
    self.assertLen({row.name for row in rows}, len(rows))

  def test_what_stands_in_a_table_is_what_is_planted(self):
    (row,) = apply.parse(
        "a/b.py\n-   one\n-   two\n+   three\n? why\n@ tests/c_test.py::D"
        "\n@ test_e\n@ test_f"
    )
    self.assertEqual(row.before, "  one\n  two")
    self.assertEqual(row.after, "  three")
    self.assertEqual(
        row.tests, ["tests/c_test.py::D", "-k", "test_e or test_f"]
    )
    (row,) = apply.parse("a/b.py\n- x\n+ \n? gone")
    self.assertEqual(row.after, "")
    self.assertEqual(row.tests, ["tests/a/b_test.py"])


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
  """A copy of the tree, for one worker."""
  folder = tmp_path_factory.mktemp("altered")
  apply.copy_tree(folder)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("row", apply.rows(), ids=lambda row: row.name)
def test_a_fault_makes_tests_fail(row: apply.Row, copy: pathlib.Path):
  caught, said = apply.is_caught(row, copy)
  assert caught, f"{row}\n{said}"


if __name__ == "__main__":
  absltest.main()
