import dataclasses

from absl.testing import absltest
from absl.testing import parameterized

from joma import config as config_lib
from launch import flag_config
from scansnap_jax.experiment import errors

_CONFIGS = (
    config_lib.Figure2Config,
    config_lib.Figure3Config,
    config_lib.Figure4Config,
    config_lib.InvariantsConfig,
    config_lib.ErfConfig,
    config_lib.ConvergenceConfig,
    config_lib.EntropyBounceConfig,
    config_lib.HbltConfig,
    config_lib.StableRankConfig,
)


class ConfigTest(parameterized.TestCase):

  @parameterized.parameters(*_CONFIGS)
  def test_is_documented_and_can_be_written_as_flags(self, config):
    text = flag_config.to_flagfile(config(), {})
    self.assertLen(text.splitlines(), len(dataclasses.fields(config)))

  @parameterized.parameters(
      (config_lib.Figure2Config, dict(num_seeds=0), "num_seeds must be from 1"),
      (config_lib.Figure2Config, dict(first_seed=-1), "first_seed must be"),
      (
          config_lib.Figure3Config,
          dict(record_every=30),
          "divide num_steps=2000",
      ),
      (config_lib.Figure2Config, dict(step_size=0.0), "step_size must be pos"),
      (config_lib.Figure2Config, dict(temperature=-1.0), "temperature must be"),
      (config_lib.Figure4Config, dict(mu=(1.0,)), "two or more components"),
      (config_lib.Figure4Config, dict(mu=(1.0, -1.0)), "mu must be positive"),
      (config_lib.Figure4Config, dict(initial=2.0), "below every mu, 1.26543"),
      (config_lib.Figure4Config, dict(num_steps=0), "num_steps must be from 1"),
      (config_lib.InvariantsConfig, dict(step_sizes=(0.1,)), "two or more"),
      (config_lib.InvariantsConfig, dict(step_sizes=(0.1, 0.3)), "divide time"),
      (config_lib.InvariantsConfig, dict(num_queries=()), "one or more"),
      (config_lib.InvariantsConfig, dict(num_queries=(17,)), "from 1 to 16"),
      (config_lib.ErfConfig, dict(delta=(1.0, 0.0)), "none of them 0"),
      (config_lib.ErfConfig, dict(delta=(1.0, -1.0)), "One token of delta"),
      (config_lib.ErfConfig, dict(shown_until=1.0), "shown_until must be"),
      (config_lib.ConvergenceConfig, dict(mu=(1.0, 2.0)), "mu must fall"),
      (config_lib.ConvergenceConfig, dict(mu=(7.0, 2.0)), "not exceed 6"),
      (config_lib.ConvergenceConfig, dict(end_time=0.0), "end_time must be"),
      (config_lib.EntropyBounceConfig, dict(mu=(7.0, 2.0)), "mu may be up to"),
      (config_lib.EntropyBounceConfig, dict(end_time=-1.0), "end_time must be"),
      (config_lib.HbltConfig, dict(num_depths=10, branching=3), "39366 leaves"),
      (config_lib.HbltConfig, dict(polarity=(1.5,)), "polarity must lie in"),
      (config_lib.HbltConfig, dict(root_probs=(0.0,)), "root_probs must lie"),
      (config_lib.HbltConfig, dict(polarity=()), "need a value each"),
      (
          config_lib.StableRankConfig,
          dict(salience_max=0.5),
          "salience_max must",
      ),
      (config_lib.StableRankConfig, dict(num_tokens=1), "num_tokens must be"),
  )
  def test_impossible_settings_are_refused(self, config, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      config(**changes)


if __name__ == "__main__":
  absltest.main()
