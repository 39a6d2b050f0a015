"""A study that diverged says so, and claims and writes nothing."""

import dataclasses
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from joma.studies import study as study_lib
from joma.studies.figures import figure2
from joma.studies.figures import figure3
from joma.studies.figures import figure4
from joma.studies.figures import table1
from joma.studies.questions import bounce
from joma.studies.questions import drift
from joma.studies.questions import joint_invariant
from joma.studies.questions import linear_control
from joma.studies.questions import noisy_hblt
from joma.studies.questions import residual
from joma.studies.questions import two_layer_hblt
from scansnap_jax.experiment import errors

# The rate of each study that takes any; `invariants` refuses large ones.
_RATES = {
    "figure2": (figure2, "step_size"),
    "figure3": (figure3, "step_size"),
    "figure4": (figure4, "step_size"),
    "table1": (table1, "lr"),
    "bounce": (bounce, "step_size"),
    "bounce_stationary": (bounce, "stationary_step_size"),
    "drift": (drift, "step_size"),
    "joint_invariant": (joint_invariant, "step_size"),
    "linear_control": (linear_control, "step_size"),
    "noisy_hblt": (noisy_hblt, "step_size"),
    "residual": (residual, "step_size"),
    "two_layer_hblt": (two_layer_hblt, "step_size"),
}
_SHORT = {"num_steps": 40, "num_records": 10, "num_seeds": 2}
_BY_DEFAULT = ("figure4", "residual")


class DivergedTest(parameterized.TestCase):

  def _check(self, name):
    module, rate = _RATES[name]
    config = module.STUDY.config
    short = {k: v for k, v in _SHORT.items() if hasattr(config, k)}
    config = dataclasses.replace(config, **short, **{rate: 1e30})
    folder = pathlib.Path(self.create_tempdir().full_path)
    with self.assertRaisesRegex(errors.UserError, "diverged"):
      module.STUDY.measure(config, folder)

  @parameterized.parameters(*_BY_DEFAULT)
  @pytest.mark.by_default(0)
  def test_the_run_is_refused(self, name):
    self._check(name)

  @parameterized.parameters(*sorted(set(_RATES) - set(_BY_DEFAULT)))
  @pytest.mark.slow
  def test_every_run_is_refused(self, name):
    self._check(name)


class EmitTest(parameterized.TestCase):

  @parameterized.parameters(np.nan, np.inf, -np.inf)
  def test_a_curve_that_diverged_is_named_with_its_step(self, value):
    rows = []
    curves = {"fine": [1.0, 2.0, 3.0], "loss": [1.0, value, 3.0]}
    with self.assertRaisesRegex(errors.UserError, "loss is .* at step 10"):
      study_lib.emit(lambda *row: rows.append(row), [0, 10, 20], curves)
    self.assertEmpty(rows)


if __name__ == "__main__":
  absltest.main()
