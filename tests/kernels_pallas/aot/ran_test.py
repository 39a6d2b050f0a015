"""That the tests which compile did run: a test of the tests."""

import importlib
import os
import pathlib
import unittest

from absl.testing import absltest
import pytest

from kernels_pallas.aot import budgets
from kernels_pallas.aot import topology

_ROOT = pathlib.Path(__file__).parents[3]
_WHY = "libtpu is not installed"
# Continuous integration services set it.
_IS_CI = os.environ.get("CI", "").lower() == "true"


def _modules():
  """The test modules of which a part is skipped without libtpu."""
  for path in sorted((_ROOT / "tests").rglob("*_test.py")):
    if f'"{_WHY}"' in path.read_text() and path != pathlib.Path(__file__):
      name = path.relative_to(_ROOT).with_suffix("")
      yield importlib.import_module(".".join(name.parts))


def _tests(module):
  """Names of a module's tests by whether they are skipped for want of it."""
  found = {True: [], False: []}
  for case in vars(module).values():
    if isinstance(case, type) and issubclass(case, unittest.TestCase):
      why = getattr(case, "__unittest_skip_why__", "")
      names = unittest.TestLoader().getTestCaseNames(case)
      found[why == _WHY].extend(f"{case.__name__}.{name}" for name in names)
  return found


def _require_compiler():
  if topology.has_toolchain("tpu"):
    return
  if _IS_CI:
    pytest.fail("CI=true, but libtpu is not installed: nothing was compiled")
  pytest.skip("libtpu is not installed: the tests that compile are skipped")


class RanTest(absltest.TestCase):

  def test_no_test_that_compiles_is_skipped(self):
    _require_compiler()
    num_tests = {}
    for module in _modules():
      tests = _tests(module)
      self.assertEmpty(tests[True], module.__name__)
      num_tests[module.__name__] = len(tests[False])
    self.assertGreaterEqual(len(num_tests), 5, num_tests)
    self.assertGreater(sum(num_tests.values()), 60)

  def test_this_compiler_has_budgets(self):
    _require_compiler()
    known, why_none = budgets.load(budgets.compiler("tpu"))
    if not known and not _IS_CI:
      self.skipTest(why_none)
    self.assertNotEmpty(known, why_none)


if __name__ == "__main__":
  absltest.main()
