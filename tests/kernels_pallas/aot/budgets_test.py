import json
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from kernels_pallas.aot import budgets

_BUDGET = {"bundles": 1000, "spills": 0, "temp_bytes": 64}


class CheckTest(parameterized.TestCase):

  @parameterized.parameters(
      (1000, 0, 64), (1050, 0, 64), (900, 0, 0), (10, 0, 64)
  )
  def test_silent_within_the_tolerance(self, bundles, spills, temp_bytes):
    measured = dict(bundles=bundles, spills=spills, temp_bytes=temp_bytes)
    self.assertEmpty(budgets.check(measured, _BUDGET))

  @parameterized.parameters(
      ("bundles", 1051, "bundles rose from 1000 to 1051"),
      ("spills", 1, "spills rose from 0 to 1"),
      ("temp_bytes", 65, "temp_bytes rose from 64 to 65"),
  )
  def test_says_what_rose(self, name, value, sentence):
    self.assertEqual(
        budgets.check(_BUDGET | {name: value}, _BUDGET), [sentence]
    )

  def test_bytes_may_not_rise_by_one_in_many(self):
    many = {"temp_bytes": 10**9}
    self.assertEqual(
        budgets.check({"temp_bytes": 10**9 + 1}, many),
        ["temp_bytes rose from 1000000000 to 1000000001"],
    )

  def test_a_figure_that_is_gone_is_missed(self):
    (sentence,) = budgets.check({"bundles": 1, "spills": 0}, _BUDGET)
    self.assertEqual(sentence, "temp_bytes has a budget of 64: not measured")


class CompilerTest(absltest.TestCase):

  def test_releases_of_corrections_count_as_one(self):
    with mock.patch.object(
        budgets.importlib.metadata, "version", return_value="0.0.48.1"
    ):
      self.assertEqual(budgets.compiler("tpu"), "libtpu 0.0.48")


class FileTest(absltest.TestCase):

  def test_what_is_written_is_read_by_the_same_compiler_alone(self):
    path = pathlib.Path(self.create_tempdir().full_path) / "budgets.json"
    budgets.update({"flash": {"v5e": _BUDGET}}, "libtpu 1", path)
    budgets.update({"flash": {"v6e": _BUDGET}}, "libtpu 1", path)
    budgets.update({"flash": {"v6e": {"bundles": 7}}}, "libtpu 2", path)
    self.assertEqual(
        budgets.load("libtpu 1", path),
        ({"flash": {"v5e": _BUDGET, "v6e": _BUDGET}}, ""),
    )
    self.assertEqual(
        budgets.load("libtpu 3", path),
        (
            {},
            (
                "no budgets of libtpu 3, only of libtpu 1, libtpu 2: nothing"
                " compared"
            ),
        ),
    )

  def test_the_file_of_the_package_is_well_formed(self):
    for version, cases in json.loads(budgets.PATH.read_text()).items():
      self.assertRegex(version, r"^(libtpu|jax-cuda13-pjrt) \d+\.\d+\.\d+$")
      for by_chip in cases.values():
        for figures in by_chip.values():
          self.assertEmpty(budgets.check(figures, figures))


if __name__ == "__main__":
  absltest.main()
