import dataclasses
import functools
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
from kernels_pallas.decode import api
from kernels_pallas.decode import pallas_gpu
from kernels_pallas.decode import shapes
from kernels_pallas.decode import slots
from tests.kernels_pallas.decode import oracle

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
      (1, 8, 16_384, 33), (1, 8, 1024, 4), (16, 8, 4096, 3), (64, 8, 4096, 1)
  )
  def test_parts_fill_the_chip(self, *sizes_and_parts):
    *sizes, num_parts = sizes_and_parts
    self.assertEqual(pallas_gpu.choose_parts(*sizes), num_parts)

  @parameterized.parameters("num_parts", "num_stages")
  def test_sizes_of_nothing(self, name):
    with self.assertRaisesRegex(ValueError, f"{name}=0 must be at least 1"):
      pallas_gpu.Config(**{name: 0})


def draw(num_groups, head_dim, capacity, cache_dtype, seed=0):
  """A step of three sequences: one full, one half empty, one inactive."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  lead = (3, 2, capacity)
  pos = np.stack(
      [rng.permutation(lead[2]) for _ in range(lead[0] * lead[1])]
  ).reshape(lead)
  pos[1] = np.where(pos[1] % 2, pos[1], -1)
  rows = [normal(*lead, head_dim) for _ in range(2)]
  scales = [None, None]
  if cache_dtype == "int8":
    rows, scales = zip(*map(slots.quantize, rows), strict=True)
  cache = slots.Slots(
      key=rows[0].astype(cache_dtype),
      value=rows[1].astype(cache_dtype),
      score=jnp.asarray(rng.random(lead), jnp.float32),
      pos=jnp.asarray(pos, jnp.int32),
      key_scale=scales[0],
      value_scale=scales[1],
  )
  query = 2 * normal(3, 2 * num_groups, head_dim)  # Some tokens are heavy.
  vectors = (query, normal(3, 2, head_dim), normal(3, 2, head_dim))
  positions = jnp.array([capacity, capacity + 3, -1], jnp.int32)
  return (*(x.astype(jnp.bfloat16) for x in vectors), cache, positions)


_OPTIONS = {"num_sinks": 2, "num_recent": 5, "decay": 0.9}


@needs_new_jax
class InterpretedTest(parameterized.TestCase):

  @parameterized.parameters(
      ("bfloat16", 4, 64, 130, {}),
      ("bfloat16", 1, 128, 130, {"reduce": "max", "window": 60}),
      ("int8", 4, 64, 130, {"reduce": "max", "logits_soft_cap": 3.0}),
      ("int8", 1, 64, 130, {"window": 60, "logits_soft_cap": 3.0}),
      # Heads of 40 are padded; parts of one tile, one of them without keys.
      ("int8", 9, 40, 192, {"window": 20, "scale": -0.3, "score": "mean"}),
  )
  @pytest.mark.by_default(0)
  def test_a_step_equals_the_reference(
      self, cache_dtype, num_groups, head_dim, capacity, options
  ):
    arrays = draw(num_groups, head_dim, capacity, cache_dtype)
    call = functools.partial(api.decode_step, *arrays, **_OPTIONS | options)
    expected = call(implementation="reference")
    config = pallas_gpu.Config(num_parts=3 if capacity == 192 else 2)
    with interpret.interpreted():
      found = call(implementation="pallas_gpu", config=config)
    np.testing.assert_array_equal(found[2], expected[2])
    self.assertEqual(found[0].dtype, jnp.bfloat16)
    np.testing.assert_allclose(
        *(np.asarray(x[0], np.float64) for x in (found, expected)),
        atol=oracle.ATOL["bfloat16"] * 4,  # The largest of the values.
        rtol=0,
    )
    np.testing.assert_array_equal(found[0][2].astype(jnp.float32), 0)
    for name in ("key", "value", "pos", "key_scale", "value_scale"):
      one, other = (getattr(x[1], name) for x in (found, expected))
      if one is not None:
        self.assertEqual(one.dtype, other.dtype)
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(
        found[1].score,
        expected[1].score,
        atol=oracle.ATOL["float32"],
        rtol=0,
    )

  @pytest.mark.slow
  def test_no_race(self):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    # A ring that is filled more than once.
    step = functools.partial(
        api.decode_step,
        *draw(4, 64, 250, "int8"),
        implementation="pallas_gpu",
        config=pallas_gpu.Config(num_parts=1, num_stages=2),
    )
    with interpret.interpreted(plgpu.InterpretGPUParams(detect_races=True)):
      jax.block_until_ready(step())
      assert not gpu_callbacks.get_races().races_found

  @parameterized.parameters("sum", "max")
  @pytest.mark.slow
  def test_steps_in_a_row_equal_plain_python(self, reduce):
    shape = dataclasses.replace(_SHAPE, capacity=24)
    case = oracle.draw(shape, 40, "bfloat16")
    options = {"num_sinks": 2, "num_recent": 5, "reduce": reduce}
    found = oracle.run(case, "pallas_gpu", **options)
    oracle.check(case, found, oracle.decode(case, **options))

  @parameterized.parameters(
      ({}, "float32", None, "bfloat16 and float16, not float32"),
      ({}, "bfloat16", "float32", "the query's type, bfloat16, or int8"),
      ({}, "float32", "int8", "bfloat16 and float16, not float32"),
      ({"num_stages": 9}, "bfloat16", None, "fewer stages"),
      ({"num_heads": 130}, "bfloat16", None, "up to 64 query heads a key head"),
  )
  def test_says_what_it_lacks(self, sizes, dtype, cache_dtype, message):
    num_heads = sizes.pop("num_heads", 4)
    shape = dataclasses.replace(_SHAPE, num_heads=num_heads, head_dim=128)
    step = functools.partial(
        api.decode_step,
        implementation="pallas_gpu",
        config=pallas_gpu.Config(**sizes),
    )
    with interpret.interpreted(), self.assertRaisesRegex(ValueError, message):
      jax.eval_shape(step, *shape.arrays(dtype, cache_dtype))


def program(batch, capacity, cache_dtype="bfloat16", num_groups=4, **options):
  """A step of 8 key heads, for `aot`."""
  shape = shapes.Shape(
      batch=batch,
      num_heads=8 * num_groups,
      num_kv_heads=8,
      capacity=capacity,
      head_dim=options.pop("head_dim", 128),
  )
  step = functools.partial(
      api.decode_step, implementation="pallas_gpu", **options
  )
  arrays = shape.arrays("bfloat16", cache_dtype)
  return jax.jit(step, donate_argnums=3), arrays


@needs_compiler
class CompiledTest(parameterized.TestCase):

  def test_compiles_for_the_h100_without_spills(self):
    name = "tests.kernels_pallas.decode.pallas_gpu_test:program"
    everything = {"window": 512, "logits_soft_cap": 30.0, "reduce": "max"}
    cases = (
        {},
        {"cache_dtype": "int8"} | everything,
        {"cache_dtype": "int8", "head_dim": 64, "num_groups": 1},
    )
    sizes = {"batch": 1, "capacity": 4096}
    reports = ptx.report([jobs.Job("h100", name, sizes | x) for x in cases])
    for report in reports:
      (kernel,) = report.kernels
      self.assertEqual(kernel.spill_store_bytes, 0, kernel)
      self.assertGreater(kernel.num_wgmma, 0)
      # Two blocks share a multiprocessor's memory, 1 KiB of each reserved.
      self.assertLess(2 * (kernel.smem_bytes + 2048), 228 * 2**10)
      # No copy of keys or values, of 4 MiB at least.
      self.assertLess(report.temp_bytes, 2**21)


if __name__ == "__main__":
  absltest.main()
