import dataclasses

from absl.testing import absltest
from absl.testing import parameterized

from joma.studies.figures import figure2
from joma.studies.figures import figure3
from joma.studies.figures import figure4
from joma.studies.theorems import convergence
from joma.studies.theorems import entropy_bounce
from joma.studies.theorems import erf
from joma.studies.theorems import hblt
from joma.studies.theorems import invariants
from joma.studies.theorems import stable_rank
from launch.command import flag_config
from scansnap_jax.experiment import errors

_CONFIGS = (
    figure2.Figure2Config,
    figure3.Figure3Config,
    figure4.Figure4Config,
    invariants.InvariantsConfig,
    erf.ErfConfig,
    convergence.ConvergenceConfig,
    entropy_bounce.EntropyBounceConfig,
    hblt.HbltConfig,
    stable_rank.StableRankConfig,
)


class ConfigTest(parameterized.TestCase):

  @parameterized.parameters(*_CONFIGS)
  def test_is_documented_and_can_be_written_as_flags(self, config):
    text = flag_config.to_flagfile(config(), {})
    self.assertLen(text.splitlines(), len(dataclasses.fields(config)))

  @parameterized.parameters(
      (figure2.Figure2Config, dict(num_seeds=0), "num_seeds must be from 1"),
      (figure2.Figure2Config, dict(first_seed=-1), "first_seed must be"),
      (
          figure3.Figure3Config,
          dict(record_every=30),
          "divide num_steps=2000",
      ),
      (figure2.Figure2Config, dict(step_size=0.0), "step_size must be pos"),
      (figure2.Figure2Config, dict(temperature=-1.0), "temperature must be"),
      (figure4.Figure4Config, dict(mu=(1.0,)), "two or more components"),
      (figure4.Figure4Config, dict(mu=(1.0, -1.0)), "mu must be positive"),
      (figure4.Figure4Config, dict(initial=2.0), "below every mu, 1.26543"),
      (figure4.Figure4Config, dict(num_steps=0), "num_steps must be from 1"),
      (invariants.InvariantsConfig, dict(step_sizes=(0.1,)), "two or more"),
      (invariants.InvariantsConfig, dict(step_sizes=(0.1, 0.3)), "divide time"),
      (invariants.InvariantsConfig, dict(num_queries=()), "one or more"),
      (invariants.InvariantsConfig, dict(num_queries=(17,)), "from 1 to 16"),
      (erf.ErfConfig, dict(delta=(1.0, 0.0)), "none of them 0"),
      (erf.ErfConfig, dict(delta=(1.0, -1.0)), "One token of delta"),
      (erf.ErfConfig, dict(shown_until=1.0), "shown_until must be"),
      (convergence.ConvergenceConfig, dict(mu=(1.0, 2.0)), "mu must fall"),
      (convergence.ConvergenceConfig, dict(mu=(7.0, 2.0)), "not exceed 6"),
      (convergence.ConvergenceConfig, dict(end_time=0.0), "end_time must be"),
      (
          entropy_bounce.EntropyBounceConfig,
          dict(mu=(7.0, 2.0)),
          "mu may be up to",
      ),
      (
          entropy_bounce.EntropyBounceConfig,
          dict(end_time=-1.0),
          "end_time must be",
      ),
      (hblt.HbltConfig, dict(num_depths=10, branching=3), "39366 leaves"),
      (hblt.HbltConfig, dict(polarity=(1.5,)), "polarity must lie in"),
      (hblt.HbltConfig, dict(root_probs=(0.0,)), "root_probs must lie"),
      (hblt.HbltConfig, dict(polarity=()), "need a value each"),
      (
          stable_rank.StableRankConfig,
          dict(salience_max=0.5),
          "salience_max must",
      ),
      (stable_rank.StableRankConfig, dict(num_tokens=1), "num_tokens must be"),
  )
  def test_impossible_settings_are_refused(self, config, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      config(**changes)


if __name__ == "__main__":
  absltest.main()
