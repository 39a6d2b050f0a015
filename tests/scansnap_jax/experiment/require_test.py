import math

from absl.testing import absltest
from absl.testing import parameterized

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


class RequireTest(parameterized.TestCase):

  @parameterized.parameters(
      (lambda: require.at_least("steps", 0, 1), "steps .* at least 1, got 0"),
      (lambda: require.at_least("steps", 2**31, 1), "up to 2147483647, got"),
      (lambda: require.seeds("seed", 0, 10**12), "1000000000000 seeds, and"),
      (lambda: require.between("rho", -1, 0, 1), "rho .* 0 to 1, got -1"),
      (lambda: require.between("rho", 2, 0, 1), "rho .* 0 to 1, got 2"),
      (lambda: require.seeds("seed", -1), "seed .* 0 to 2147483647, got -1"),
      (lambda: require.seeds("seed", 2**31), "got 2147483648"),
      (
          lambda: require.seeds("first", 2**31 - 2, 3),
          "first .* 0 to 2147483645, got 2147483646",
      ),
      (
          lambda: require.memory("num_steps=9", 1e18),
          r"num_steps=9 would take 1,000,000,000\.0 GB",
      ),
      (lambda: require.positive("rate", 0.0), "rate .* positive.*0.0"),
      (lambda: require.not_negative("rate", -1.0), "rate .* negative.*-1.0"),
      (lambda: require.not_negative("rate", math.nan), "rate .* got nan"),
      (lambda: require.positive("rate", math.inf), "rate .* finite.*inf"),
      (lambda: require.positive("rate", math.nan), "rate .* got nan"),
  )
  def test_names_setting_bound_and_value(self, check, message):
    with self.assertRaisesRegex(errors.UserError, message):
      check()

  def test_takes_the_bounds(self):
    require.seeds("seed", 0)
    require.seeds("first", 2**31 - 3, 3)
    require.memory("num_steps=9", 36)
    require.at_least("steps", 1, 1)
    require.at_least("steps", 2**31 - 1, 1)
    require.between("rho", 0, 0, 1)
    require.between("rho", 1, 0, 1)
    require.positive("rate", 1e-30)


if __name__ == "__main__":
  absltest.main()
