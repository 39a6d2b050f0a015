"""Kernels run compiled where their chip is, and interpreted elsewhere."""

from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from kernels_pallas import implementations
from kernels_pallas import interpret
from tests.kernels_pallas import modes


class ModeTest(parameterized.TestCase):

  @parameterized.parameters(
      ("cpu", ("pallas_tpu", "pallas_gpu")),
      ("tpu", ("pallas_gpu",)),
      ("gpu", ("pallas_tpu",)),
  )
  def test_kernels_of_other_chips_are_interpreted(self, platform, expected):
    found = []
    with mock.patch.object(
        implementations.jax, "default_backend", return_value=platform
    ):
      for name in ("reference", "xla", "pallas_tpu", "pallas_gpu"):
        with modes.mode_of(name):
          if interpret.mode():
            found.append(name)
    self.assertEqual(tuple(found), expected)


if __name__ == "__main__":
  absltest.main()
