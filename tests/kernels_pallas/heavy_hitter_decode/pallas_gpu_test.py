import functools
import shutil

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import interpret
from kernels_pallas.aot import jobs
from kernels_pallas.aot import ptx
from kernels_pallas.aot import topology
from kernels_pallas.heavy_hitter_decode import api
from kernels_pallas.heavy_hitter_decode import pallas_gpu
from kernels_pallas.heavy_hitter_decode import shapes
from tests.kernels_pallas.heavy_hitter_decode import oracle

needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax >= 0.11"
)
needs_compiler = pytest.mark.skipif(
    not topology.has_toolchain("cuda") or shutil.which("ptxas") is None,
    reason="compiling for the H100 needs jax >= 0.11, jax-cuda13-plugin, ptxas",
)
_SHAPE = shapes.Shape(
    batch=2, num_heads=4, num_kv_heads=2, capacity=128, head_dim=64
)


class ConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      (1, 8, 16_384, 32), (1, 8, 1024, 4), (16, 8, 4096, 2), (64, 8, 4096, 1)
  )
  def test_parts_fill_the_chip_and_divide_the_slots(self, *sizes_and_parts):
    *sizes, num_parts = sizes_and_parts
    self.assertEqual(pallas_gpu.choose_parts(*sizes), num_parts)


@needs_new_jax
class InterpretedTest(parameterized.TestCase):

  def test_a_step_equals_the_reference(self):
    # A cache that is full, and one that is not; the new tokens of both.
    case = oracle.draw(_SHAPE, 150, "bfloat16")
    options = {"num_sinks": 2, "num_recent": 5, "logits_soft_cap": 3.0}
    _, _, cache = oracle.run(case, "xla", **options)
    one = oracle.draw(_SHAPE, 1, "bfloat16", seed=1)
    arrays = (one.query[0], one.key[0], one.value[0])
    positions = jnp.array([200, 140], jnp.int32)
    call = functools.partial(
        api.heavy_hitter_decode, *arrays, cache, positions, **options
    )
    expected = call(implementation="reference")
    config = pallas_gpu.Config(num_parts=2)
    with interpret.interpreted():
      found = call(implementation="pallas_gpu", config=config)
    np.testing.assert_array_equal(found[2], expected[2])
    wide = [np.asarray(x[0], np.float64) for x in (found, expected)]
    largest = np.abs(np.asarray(cache.value, np.float64)).max()
    np.testing.assert_allclose(*wide, atol=oracle.ATOL["bfloat16"] * largest)
    np.testing.assert_array_equal(found[1].pos, expected[1].pos)
    np.testing.assert_array_equal(
        *(np.asarray(x[1].key, np.float32) for x in (found, expected))
    )
    np.testing.assert_allclose(
        found[1].score,
        expected[1].score,
        atol=oracle.ATOL["float32"] * expected[1].score.max(),
    )

  @parameterized.parameters(
      ({"reduce": "max"}, "bfloat16", None, "reduce='sum' alone, not 'max'"),
      ({}, "float32", None, "bfloat16 and float16, not float32"),
      ({}, "bfloat16", "int8", "needs a cache of the query's type"),
      ({"num_parts": 3}, "bfloat16", None, "num_parts=3 must divide the 128"),
  )
  def test_says_what_it_lacks(self, options, dtype, cache_dtype, message):
    num_parts = options.get("num_parts")
    options = {k: v for k, v in options.items() if k != "num_parts"}
    step = functools.partial(
        api.heavy_hitter_decode,
        implementation="pallas_gpu",
        config=pallas_gpu.Config(num_parts=num_parts),
        **options,
    )
    with interpret.interpreted(), self.assertRaisesRegex(ValueError, message):
      jax.eval_shape(step, *_SHAPE.arrays(dtype, cache_dtype))


def program(batch, capacity):
  """A step of 32 query and 8 key heads, for `aot`."""
  shape = shapes.Shape(
      batch=batch, num_heads=32, num_kv_heads=8, capacity=capacity
  )
  step = functools.partial(api.heavy_hitter_decode, implementation="pallas_gpu")
  return jax.jit(step, donate_argnums=3), shape.arrays()


@needs_compiler
class CompiledTest(parameterized.TestCase):

  def test_compiles_for_the_h100_without_spills(self):
    name = "tests.kernels_pallas.heavy_hitter_decode.pallas_gpu_test:program"
    sizes = {"batch": 1, "capacity": 4096}
    (report,) = ptx.report([jobs.Job("h100", name, sizes)])
    self.assertLen(report.kernels, 2)
    for kernel in report.kernels:
      self.assertEqual(kernel.spill_store_bytes, 0, kernel)
      self.assertGreater(kernel.num_wgmma, 0)
    # No copy of keys or values, of 8 MiB each.
    self.assertLess(report.temp_bytes, 2**21)


if __name__ == "__main__":
  absltest.main()
