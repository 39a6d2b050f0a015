"""What the settings of trained studies are held to, in every study alike."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized

from joma.studies.systems import conv
from joma.studies.systems import mqar
from joma.studies.systems import retrieval
from joma.studies.systems.probes import head_drift
from joma.studies.systems.probes import recall
from joma.studies.systems.readouts import grid
from joma.studies.systems.readouts import pairs
from joma.studies.systems.readouts import pooling
from joma.studies.systems.routing import flux
from joma.studies.systems.routing import moh
from joma.studies.systems.routing import nats
from scansnap_jax.experiment import errors

# A size each, of which there must be one or more.
_SIZES = (
    (conv, "num_pairs"),
    (mqar, "num_test"),
    (retrieval, "budget"),
    (head_drift, "span"),
    (recall, "num_random"),
    (grid, "num_heads"),
    (pairs, "num_tokens"),
    (pooling, "num_latents"),
    (flux, "num_chains"),
    (moh, "num_texts"),
    (nats, "num_asked"),
)


class TrainedTest(parameterized.TestCase):

  @parameterized.parameters(*_SIZES)
  def test_runs_rates_and_sizes_are_checked(self, study, size):
    config = study.STUDY.config
    for changes, message in (
        ({size: 0}, f"{size} must be at least 1, got 0"),
        ({"rate": 0.0}, "rate must be positive"),
        ({"num_seeds": 1}, "num_seeds must be at least 2"),
        ({"num_records": 7}, "num_steps must be a multiple of num_records=7"),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        dataclasses.replace(config, **changes)


if __name__ == "__main__":
  absltest.main()
