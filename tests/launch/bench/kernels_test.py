import types
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from kernels_pallas.aot import topology
from launch.bench import kernels
from scansnap_jax.experiment import errors


class MeasureTest(parameterized.TestCase):

  @parameterized.parameters(
      "tpu:v9", "tpu:h100", "tpu", "v5e", "rocm", "gpu:b200"
  )
  def test_an_unknown_target_is_named(self, target):
    with self.assertRaisesRegex(errors.UserError, target.split(":")[-1]):
      kernels.measure(target, [1024])

  @parameterized.parameters(
      ("gpu", "gpu"), ("cpu", "cpu"), ("h100", "h100"), ("gpu:h100", "h100")
  )
  def test_each_target_has_a_module(self, target, name):
    rows = [{"what": name}]
    module = types.SimpleNamespace(report=lambda *ops: rows)
    with mock.patch.object(
        kernels.importlib, "import_module", return_value=module
    ) as imported:
      self.assertEqual(kernels.measure(target, []), rows)
    imported.assert_called_once_with(f"launch.bench.ops.{name}")

  def test_a_missing_compiler_is_one_sentence(self):
    with mock.patch.object(topology, "has_toolchain", return_value=False):
      with self.assertRaisesRegex(errors.UserError, "pip install 'jax.tpu.'"):
        kernels.measure("tpu:v5e", [1024])

  @parameterized.parameters("100", "0", "1025", "-1024", "many")
  def test_lengths_are_multiples_of_1024(self, text):
    with self.assertRaisesRegex(errors.UserError, "multiple of 1024"):
      kernels._length(text)


if __name__ == "__main__":
  absltest.main()
