"""A study that diverged says so, and claims and writes nothing."""

from collections.abc import Iterator
import dataclasses
import importlib
import pathlib
import pkgutil

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from joma import studies
from joma.studies import study as study_lib
from scansnap_jax.experiment import errors

_ENDS = ("step_size", "_rate")


def _find() -> Iterator[tuple[str, study_lib.Study, str]]:
  """All studies below `joma.studies`, with the rates that each takes."""
  prefix = f"{studies.__name__}."
  for found in pkgutil.walk_packages(studies.__path__, prefix):
    study = getattr(importlib.import_module(found.name), "STUDY", None)
    if study is None:
      continue
    for field in dataclasses.fields(study.config):
      # `invariants` takes several, and refuses large ones.
      if field.name in ("lr", "rate") or field.name.endswith(_ENDS):
        yield found.name.rpartition(".")[2], study, field.name


_FOUND = {f"{name}.{rate}": (study, rate) for name, study, rate in _find()}
# Of studies that have no settings for a smoke run of their own.
_SHORT = {"num_steps": 40, "num_records": 10, "num_seeds": 2}
_BY_DEFAULT = ("figure4.step_size", "residual.step_size")


class DivergedTest(parameterized.TestCase):

  def _check(self, name):
    study, rate = _FOUND[name]
    short = {k: v for k, v in _SHORT.items() if hasattr(study.config, k)}
    small = dict(study.smoke) or short
    config = dataclasses.replace(study.config, **small | {rate: 1e30})
    folder = pathlib.Path(self.create_tempdir().full_path)
    with self.assertRaisesRegex(errors.UserError, "diverged"):
      study.measure(config, folder)

  @parameterized.parameters(*_BY_DEFAULT)
  @pytest.mark.by_default(0)
  def test_the_run_is_refused(self, name):
    self._check(name)

  @parameterized.parameters(*sorted(set(_FOUND) - set(_BY_DEFAULT)))
  @pytest.mark.slow
  def test_every_run_is_refused(self, name):
    self._check(name)

  def test_studies_are_found(self):
    self.assertGreater(len(_FOUND), 20)
    self.assertContainsSubset(
        ["positional.rate", "linear_control.stationary_step_size"], _FOUND
    )


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
