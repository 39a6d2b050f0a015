import dataclasses

from absl.testing import absltest
from absl.testing import parameterized

from joma.studies.questions import bounce
from joma.studies.questions import drift
from joma.studies.questions import joint_invariant
from joma.studies.questions import linear_control
from joma.studies.questions import noisy_hblt
from joma.studies.questions import residual
from joma.studies.questions import two_layer_hblt
from scansnap_jax.experiment import errors

_CLASSES = (
    bounce.BounceConfig,
    drift.DriftConfig,
    joint_invariant.JointInvariantConfig,
    linear_control.LinearControlConfig,
    noisy_hblt.NoisyHbltConfig,
    residual.ResidualConfig,
    two_layer_hblt.TwoLayerHbltConfig,
)


class ConfigTest(parameterized.TestCase):

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
      (bounce.BounceConfig, dict(noise=0.0), "noise must be positive"),
      (
          linear_control.LinearControlConfig,
          dict(noises=(0.1, 0.1)),
          "two or more different",
      ),
      (
          joint_invariant.JointInvariantConfig,
          dict(num_steps=405, num_records=5),
          "num_steps must be even",
      ),
      (residual.ResidualConfig, dict(num_queries=1), "num_queries must be"),
      (
          two_layer_hblt.TwoLayerHbltConfig,
          dict(polarity=1.1),
          r"lie in \(0, 1\]",
      ),
      (
          two_layer_hblt.TwoLayerHbltConfig,
          dict(num_scores=3),
          "multiple of num_sc",
      ),
      (
          two_layer_hblt.TwoLayerHbltConfig,
          dict(weak_polarity=-0.1),
          "weak_polarity",
      ),
      (noisy_hblt.NoisyHbltConfig, dict(num_roots=3), "must be even"),
      (noisy_hblt.NoisyHbltConfig, dict(num_classes=21), "up to 20"),
      (noisy_hblt.NoisyHbltConfig, dict(branching=()), "branching needs"),
      (noisy_hblt.NoisyHbltConfig, dict(polarities=(0.5, 2.0)), "must lie in"),
  )
  def test_what_cannot_be_is_refused(self, config_class, change, message):
    with self.assertRaisesRegex(errors.UserError, message):
      config_class(**change)


if __name__ == "__main__":
  absltest.main()
