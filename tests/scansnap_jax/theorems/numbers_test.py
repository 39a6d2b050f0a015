"""The numbers of docs/theory.md that are rows of the table."""

import pathlib
import re

from absl.testing import absltest
import pytest

from scansnap_jax.theorems import table

_DOCS = pathlib.Path(__file__).parents[3] / "docs" / "theory.md"
_NUMBER = r"(-?\d*\.?\d+(?:e-?\d+)?)"
# Such as *Lemma 6, h*: 2e-9 / 1e-8, or the cells of a table's line.
_ROW = re.compile(rf"\*([^*|]+)\*\s*[:|]\s*{_NUMBER}\s*/\s*{_NUMBER}")
# Of what only rounding makes, the size alone is the same everywhere.
_ROUNDING = 1e-9


def printed(text):
  """Yields name, measured and bound of the rows that a text prints."""
  yield from _ROW.findall(" ".join(text.split()))


def agrees(number, value):
  """Whether a printed number is the value, to its last digit."""
  if abs(value) < _ROUNDING:
    return abs(float(number)) < _ROUNDING
  digits, _, power = number.partition("e")
  last = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
  return abs(float(number) - value) <= 0.51 * last


class NumbersTest(absltest.TestCase):

  def test_reads_rows_of_text_and_of_tables(self):
    text = "(*One,\n a*: 2e-16 / 1e-12) | law | *Two* | .570 / 1 |"
    self.assertEqual(
        [*printed(text)],
        [("One, a", "2e-16", "1e-12"), ("Two", ".570", "1")],
    )

  def test_a_digit_that_differs_is_seen(self):
    self.assertTrue(agrees(".570", 0.5704))
    self.assertFalse(agrees(".570", 0.5712))
    self.assertTrue(agrees("4.8e-4", 4.81e-4))
    self.assertFalse(agrees("4.8e-4", 4.9e-4))
    self.assertTrue(agrees("2e-16", 7e-15))
    self.assertFalse(agrees("2e-16", 7e-4))

  @pytest.mark.slow
  def test_the_page_prints_what_the_rows_measure(self):
    rows = {check.name: check for check in table.check_all()}
    found = [*printed(_DOCS.read_text())]
    self.assertGreater(len(found), 30)
    for name, measured, bound in found:
      with self.subTest(name):
        self.assertTrue(agrees(measured, rows[name].measured), measured)
        self.assertTrue(agrees(bound, rows[name].bound), bound)


if __name__ == "__main__":
  absltest.main()
