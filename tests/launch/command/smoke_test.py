"""`--preset=smoke`: all of a script's work, in seconds."""

import dataclasses
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from joma.hierarchy import config as table1
from joma.inference.bridge import config as bridge
from joma.inference.evaluation import evaluate_config
from joma.inference.sparsity import contextual_config
from joma.transformer.rope import extension_config
from joma.transformer.training import lm_config
from scansnap_jax import config as scansnap
from tests.faults import attacks
from tests.faults import scripts
from tests.joma.studies.systems import small as systems
from tests.joma.studies.theories import small as theories

_CONFIGS = {
    "scansnap": scansnap,
    "joma": table1,
    "train_lm": lm_config,
    "evaluate_cache": evaluate_config,
    "bridge": bridge,
    "contextual_sparsity": contextual_config,
    "rope_extension": extension_config,
}
# As `launch.attention` calls it.
_STUDIES = {
    {"head_drift": "drift"}.get(name, name): study
    for name, study in (systems.STUDIES | theories.STUDIES).items()
}
_SECONDS = 60


class ConfigsTest(absltest.TestCase):

  def test_every_script_and_study_has_one(self):
    for module in _CONFIGS.values():
      self.assertTrue(dataclasses.is_dataclass(module.smoke()))
    source = (scripts._ROOT / "launch" / "attention.py").read_text()
    for name, study in _STUDIES.items():
      self.assertIn(f'    "{name}": ', source)
      found = dataclasses.replace(study.config, **study.smoke)
      self.assertNotEqual(found, study.config)
    self.assertEqual(source.count(".STUDY,\n"), len(_STUDIES))


class SmokeTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.zygote = cls.enterClassContext(attacks.Zygote())

  def _run(self, *argv):
    folder = pathlib.Path(self.create_tempdir().full_path)
    ended = self.zygote.attack(
        *argv,
        "--preset=smoke",
        "--workdir=run",
        cwd=folder,
        cpu_s=_SECONDS,
        hooks=["undrawn"],
    )
    self.assertEqual(ended.status, 0, ended.err)
    self.assertTrue((folder / "run" / "summary.json").exists())

  @parameterized.parameters(*_CONFIGS)
  @pytest.mark.slow
  def test_a_script(self, name):
    self._run(f"launch.{name}")

  @parameterized.parameters(*_STUDIES)
  @pytest.mark.slow
  def test_a_study_of_attention(self, name):
    self._run("launch.attention", f"--study={name}")


if __name__ == "__main__":
  absltest.main()
