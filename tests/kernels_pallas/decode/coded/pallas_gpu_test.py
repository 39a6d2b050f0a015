"""A step over coded blocks on a GPU: interpreted, and compiled for the H100."""

import shutil

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import interpret
from kernels_pallas.aot import jobs
from kernels_pallas.aot import ptx
from kernels_pallas.aot import topology
from kernels_pallas.decode.coded import api
from kernels_pallas.decode.coded import codes
from kernels_pallas.decode.coded import pallas_gpu
from tests.kernels_pallas.decode.coded import api_test

needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax >= 0.11"
)
needs_compiler = pytest.mark.skipif(
    not topology.has_toolchain("cuda") or shutil.which("ptxas") is None,
    reason="compiling for the H100 needs jax >= 0.11, jax-cuda13-plugin, ptxas",
)


def _attend(num_heads, num_kv_heads, num_blocks, positions, dtype, name):
  drawn = api_test.draw(len(positions), num_heads, num_kv_heads, num_blocks)
  query, key, value, *newest = drawn
  keys, values = api_test.coded(key, value, dtype)
  as_type = lambda x: jnp.asarray(x, dtype)
  found = api.attend(
      as_type(query),
      keys,
      values,
      *map(as_type, newest),
      jnp.array(positions),
      scale=0.7,
      implementation=name,
  )
  return np.asarray(found.astype(jnp.float32))


@needs_new_jax
class InterpretedTest(parameterized.TestCase):

  @parameterized.parameters(
      (4, 2, 3, (5, 128, 300), "bfloat16"),
      (3, 3, 6, (767, -1), "bfloat16"),
      (8, 1, 5, (640,), "float16"),
  )
  @pytest.mark.by_default(0)
  def test_is_the_reference(self, heads, kv_heads, blocks, positions, dtype):
    sizes = (heads, kv_heads, blocks, positions, jnp.dtype(dtype))
    want = _attend(*sizes, "reference")
    with interpret.interpreted():
      found = _attend(*sizes, "pallas_gpu")
    # Keys are read back in the query's type, of 8 bits or 11.
    atol = 0.04 if dtype == "bfloat16" else 0.005
    np.testing.assert_allclose(found, want, atol=atol, rtol=0)
    for b, position in enumerate(positions):
      if position < 0:
        np.testing.assert_array_equal(found[b], 0)

  @pytest.mark.slow
  def test_no_race(self):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    with interpret.interpreted(plgpu.InterpretGPUParams(detect_races=True)):
      _attend(4, 2, 5, (640, 300), jnp.bfloat16, "pallas_gpu")
      assert not gpu_callbacks.get_races().races_found

  def test_says_what_it_lacks(self):
    like = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(
        shape, jnp.dtype(dtype)
    )
    query = like(1, 4, 128)
    for arrays, message in (
        ((like(1, 4, 64), like(1, 2, 128, 64)), "heads of 64"),
        ((query, like(1, 2, 64, 128)), "blocks of 64 tokens"),
        ((like(1, 4, 128, dtype="float32"),) * 2, "not float32"),
        ((query, like(1, 2, 128, 128, dtype="float32")), "query's type"),
        ((like(1, 130, 128), like(1, 2, 128, 128)), "up to 64 query heads"),
    ):
      self.assertRegex(pallas_gpu.lacks(*arrays) or "", message)
    self.assertIsNone(pallas_gpu.lacks(query, like(1, 2, 128, 128)))


def program(batch, num_blocks, num_groups=4):
  """A step of 8 key heads, for `aot`."""
  like = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(
      shape, jnp.dtype(dtype)
  )
  small = lambda: like(batch, num_blocks, 8, 128)
  data = lambda: like(batch, num_blocks, 8, 64, 128, dtype="uint8")
  coded = lambda: codes.Blocks(data(), small(), small())
  newest = like(batch, 8, 128, 128)
  query = like(batch, 8 * num_groups, 128)
  step = lambda *arrays: api.attend(
      *arrays, scale=0.1, implementation="pallas_gpu"
  )
  positions = like(batch, dtype="int32")
  return jax.jit(step), (query, coded(), coded(), newest, newest, positions)


@needs_compiler
class CompiledTest(absltest.TestCase):

  def test_compiles_for_the_h100_without_spills(self):
    name = "tests.kernels_pallas.decode.coded.pallas_gpu_test:program"
    cases = (
        {"batch": 1, "num_blocks": 32},
        {"batch": 16, "num_blocks": 32, "num_groups": 1},
    )
    reports = ptx.report([jobs.Job("h100", name, x) for x in cases])
    for report, case in zip(reports, cases, strict=True):
      (kernel,) = report.kernels
      self.assertEqual(kernel.spill_store_bytes, 0, kernel)
      self.assertGreater(kernel.num_wgmma, 0)
      # Two blocks share a multiprocessor: its memory, 1 KiB of each reserved,
      # and its registers, of 128 threads each.
      self.assertLess(2 * (kernel.smem_bytes + 2048), 228 * 2**10)
      self.assertLessEqual(2 * 128 * kernel.registers, 2**16)
      # Queries and parts of out, and no copy of keys' or values' codes.
      num_codes = 8 * 64 * 128 * case["batch"] * case["num_blocks"]
      self.assertLess(report.temp_bytes, num_codes / 2)


if __name__ == "__main__":
  absltest.main()
