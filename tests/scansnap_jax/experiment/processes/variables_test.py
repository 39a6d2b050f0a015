import os
import pathlib
import subprocess
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from scansnap_jax.experiment import errors
from scansnap_jax.experiment.processes import variables

_ROOT = pathlib.Path(__file__).parents[4]


class CheckTest(parameterized.TestCase):

  @parameterized.parameters("abc", "", "-1", "1e9", "99999999999999")
  def test_a_date_that_is_none_is_refused_before_any_work(self, value):
    with (
        mock.patch.dict(os.environ, {"SOURCE_DATE_EPOCH": value}),
        self.assertRaisesRegex(
            errors.UserError, f"SOURCE_DATE_EPOCH={value} must be seconds"
        ),
    ):
      variables.check()

  @parameterized.parameters("0", "1764500000", "253402300799", None)
  def test_a_date_passes(self, value):
    given = {} if value is None else {"SOURCE_DATE_EPOCH": value}
    with mock.patch.dict(os.environ, given):
      if value is None:
        os.environ.pop("SOURCE_DATE_EPOCH", None)
      variables.check()


class SettleTest(parameterized.TestCase):

  def test_no_backend_of_figures_is_asked_for(self):
    with (
        mock.patch.dict(os.environ, {"MPLBACKEND": "abacus"}),
        mock.patch.object(sys, "excepthook"),
    ):
      variables.settle()
      self.assertNotIn("MPLBACKEND", os.environ)

  @parameterized.parameters(
      ("JAX_ENABLE_X64", "maybe"),
      ("JAX_DEFAULT_MATMUL_PRECISION", "abacus"),
      ("JAX_NUM_CPU_DEVICES", "many"),
      ("JAX_THREEFRY_PARTITIONABLE", "2"),
  )
  @pytest.mark.by_default(0)
  def test_what_jax_does_not_take_is_one_line(self, name, value):
    ended = subprocess.run(
        [sys.executable, "-m", "launch.cost_table", "--lengths=512"],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env={**os.environ, name: value},
        check=False,
    )
    self.assertEqual(ended.returncode, 2, ended.stderr)
    self.assertRegex(
        ended.stderr,
        "^error: a variable of the environment is none that jax takes: .*"
        f"{value}.*{name}|{name.lower()}",
    )
    self.assertLen(ended.stderr.splitlines(), 1)

  def test_other_errors_keep_their_traceback(self):
    code = """
from scansnap_jax.experiment.processes import variables
variables.settle()
raise ValueError("mine")
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        check=False,
    )
    self.assertEqual(ended.returncode, 1)
    self.assertRegex(ended.stderr, "^Traceback (.*\n)*ValueError: mine\n$")


if __name__ == "__main__":
  absltest.main()
