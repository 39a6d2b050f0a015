import os
import pathlib
import subprocess
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
from jax._src import xla_bridge

from scansnap_jax.experiment import errors
from scansnap_jax.experiment.processes import xla_flags

_ROOT = pathlib.Path(__file__).parents[4]
_CODE = """
from scansnap_jax.experiment.processes import xla_flags
xla_flags.check()
import jax
print(jax.device_count())
"""


class CheckTest(parameterized.TestCase):

  @parameterized.parameters(
      ("--abacus=1", "Unknown flag in XLA_FLAGS: --abacus=1$"),
      (
          "--xla_cpu_enable_fast_math=false --abacus",
          "Unknown flag in XLA_FLAGS: --abacus$",
      ),
      (
          "--xla_force_host_platform_device_count=many",
          "cannot be used: Couldn't interpret value many for flag",
      ),
      ("/no/such/file", 'cannot be used: Could not open file "/no/such/file"'),
  )
  def test_what_xla_does_not_take_is_one_sentence(self, value, message):
    with (
        mock.patch.dict(os.environ, {"XLA_FLAGS": value}),
        mock.patch.object(
            xla_bridge, "backends_are_initialized", return_value=False
        ),
        # A child of this process has read other flags: it asks a new one.
        mock.patch.object(xla_flags, "_read_flags", _read_anew),
        self.assertRaisesRegex(errors.UserError, message),
    ):
      xla_flags.check()

  def test_what_it_takes_has_its_effect(self):
    flags = "--xla_force_host_platform_device_count=3"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", _CODE],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env=environment,
        check=False,
    )
    self.assertEqual((found.stdout, found.stderr), ("3\n", ""))


def _read_anew(end):
  code = "from jax._src.lib import xla_client; xla_client.CompileOptions()"
  os.dup2(end, 2)
  os.execv(sys.executable, [sys.executable, "-c", code])


if __name__ == "__main__":
  absltest.main()
