import dataclasses
import shutil

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.aot import jobs
from kernels_pallas.aot import ptx
from kernels_pallas.aot import topology
from kernels_pallas.gated_delta_rule import api
from kernels_pallas.gated_delta_rule import pallas_gpu
from kernels_pallas.gated_delta_rule import shapes
from kernels_pallas.gated_delta_rule.algebra import chunk as chunk_lib
from tests.kernels_pallas.gated_delta_rule import oracle

needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax >= 0.11"
)
needs_compiler = pytest.mark.skipif(
    not topology.has_toolchain("cuda") or shutil.which("ptxas") is None,
    reason="compiling for the H100 needs jax >= 0.11, jax-cuda13-plugin, ptxas",
)


def program(key_size, value_size, is_reversed):
  """A sweep over 4096 positions in chunks of 64; see `jobs.Job`."""
  struct = lambda *shape: jax.ShapeDtypeStruct((64, 4, 8, *shape), jnp.float32)
  arrays = (
      struct(64, value_size),
      struct(64, key_size),
      struct(64, key_size),
      struct(key_size, 1),
  )
  first = jax.ShapeDtypeStruct((4, 8, key_size, value_size), jnp.float32)
  reads = (struct(64, key_size), struct(64, value_size))

  def run(first, *arrays):
    sweep = chunk_lib.Sweep(*arrays[:4])
    found = arrays[4:] or None
    return pallas_gpu.sweep_chunks(sweep, first, jnp.bfloat16, found)

  return run, (first, *arrays, *(reads if is_reversed else ()))


# Two chunks and a ragged one, of heads that share a key head.
_SMALL = shapes.Shape(
    length=150, num_heads=2, num_key_heads=1, key_size=16, value_size=16
)


def _check(shape):
  case = oracle.draw(shape, "bfloat16")
  call = lambda **arguments: api.gated_delta_rule(
      **arguments, implementation="pallas_gpu"
  )
  oracle.check(call, case, "pallas_gpu")


@needs_new_jax
class InterpretedTest(absltest.TestCase):

  def test_equals_the_oracle(self):
    _check(_SMALL)

  @pytest.mark.slow
  def test_by_channel_and_with_several_parts(self):
    _check(dataclasses.replace(_SMALL, is_by_channel=True))
    _check(dataclasses.replace(_SMALL, key_size=96, value_size=72))
    _check(shapes.TESTS["single"])


@needs_new_jax
class WhyNotTest(parameterized.TestCase):

  @parameterized.parameters(
      ("float32", 64, "not float32; use implementation='xla'"),
      ("bfloat16", 192, "key sizes of up to 128, not of 192"),
      ("bfloat16", 128, "needs a Hopper GPU"),
  )
  def test_says_what_is_missing(self, dtype, key_size, message):
    query = jax.ShapeDtypeStruct((1, 8, 1, key_size), dtype)
    self.assertIn(message, pallas_gpu.why_not(query))


@needs_compiler
@pytest.mark.slow
class CompileTest(absltest.TestCase):

  def test_no_sweep_spills_for_an_h100(self):
    reports = ptx.report([
        jobs.Job(
            "h100",
            f"{__name__}:program",
            {
                "key_size": 128,
                "value_size": value_size,
                "is_reversed": is_reversed,
            },
        )
        for value_size in (128, 256)
        for is_reversed in (False, True)
    ])
    for report in reports:
      (kernel,) = report.kernels
      self.assertEqual(kernel.spill_store_bytes, 0, report.job)
      self.assertGreater(kernel.num_wgmma, 0)

  def test_both_passes_compile_for_an_h100(self):
    shape = shapes.BENCHMARKS["h128_128_4k"]

    def both(d_out, *arrays):
      attend = lambda *x: tuple(
          api.gated_delta_rule(*x, implementation="pallas_gpu")
      )
      result, pullback = jax.vjp(attend, *arrays)
      return result, pullback((d_out, result[1]))

    arrays = shape.arrays()
    compiled = compile_lib.compile_for("h100", both, arrays[2], *arrays)
    self.assertNotIn("4096,4096", str(compiled.jaxpr))


if __name__ == "__main__":
  absltest.main()
