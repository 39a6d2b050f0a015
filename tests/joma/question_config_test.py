import dataclasses
import inspect

from absl.testing import absltest
from absl.testing import parameterized

from joma import question_config as config_lib
from scansnap_jax.experiment import errors

_CLASSES = tuple(
    c
    for name, c in inspect.getmembers(config_lib, inspect.isclass)
    if name.endswith("Config")
)


class ConfigTest(parameterized.TestCase):

  def test_there_is_one_for_each_question(self):
    self.assertLen(_CLASSES, 7)

  @parameterized.named_parameters((c.__name__, c) for c in _CLASSES)
  def test_intervals_need_two_seeds_and_whole_records(self, config_class):
    config = config_class()
    self.assertGreaterEqual(config.num_seeds, 5)
    with self.assertRaisesRegex(errors.UserError, "num_seeds must be at least"):
      dataclasses.replace(config, num_seeds=1)
    with self.assertRaisesRegex(errors.UserError, "num_steps must be a multi"):
      dataclasses.replace(config, num_steps=config.num_steps + 1)
    with self.assertRaisesRegex(errors.UserError, "step_size must be positive"):
      dataclasses.replace(config, step_size=float("nan"))

  @parameterized.parameters(
      (config_lib.BounceConfig, dict(noise=0.0), "noise must be positive"),
      (
          config_lib.LinearControlConfig,
          dict(noises=(0.1, 0.1)),
          "two or more different",
      ),
      (
          config_lib.JointInvariantConfig,
          dict(num_steps=405, num_records=5),
          "num_steps must be even",
      ),
      (config_lib.ResidualConfig, dict(num_queries=1), "num_queries must be"),
      (config_lib.TwoLayerHbltConfig, dict(polarity=1.1), r"lie in \(0, 1\]"),
      (config_lib.TwoLayerHbltConfig, dict(num_scores=3), "multiple of num_sc"),
      (
          config_lib.TwoLayerHbltConfig,
          dict(weak_polarity=-0.1),
          "weak_polarity",
      ),
      (config_lib.NoisyHbltConfig, dict(num_roots=3), "must be even"),
      (config_lib.NoisyHbltConfig, dict(num_classes=21), "up to 20"),
      (config_lib.NoisyHbltConfig, dict(branching=()), "branching needs"),
      (config_lib.NoisyHbltConfig, dict(polarities=(0.5, 2.0)), "must lie in"),
  )
  def test_what_cannot_be_is_refused(self, config_class, change, message):
    with self.assertRaisesRegex(errors.UserError, message):
      config_class(**change)


if __name__ == "__main__":
  absltest.main()
