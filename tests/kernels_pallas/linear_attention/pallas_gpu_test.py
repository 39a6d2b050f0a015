import shutil

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.aot import jobs
from kernels_pallas.aot import ptx
from kernels_pallas.aot import topology
from kernels_pallas.linear_attention import api
from kernels_pallas.linear_attention import pallas_gpu
from kernels_pallas.linear_attention import shapes
from kernels_pallas.linear_attention import sweep as sweep_lib
from tests.kernels_pallas.linear_attention import oracle

needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax >= 0.11"
)
needs_compiler = pytest.mark.skipif(
    not topology.has_toolchain("cuda") or shutil.which("ptxas") is None,
    reason="compiling for the H100 needs jax >= 0.11, jax-cuda13-plugin, ptxas",
)


def program(head_dim, is_reversed):
  """A sweep over a sequence; see `jobs.Job`."""
  shape = shapes.Shape(
      length=2048, num_heads=4, num_kv_heads=2, head_dim=head_dim
  )
  sweep = sweep_lib.Sweep(is_reversed=is_reversed, is_out_wide=is_reversed)

  def run(*arrays):
    return pallas_gpu.run(sweep_lib.Operands(*arrays), sweep)

  float32 = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  return run, (*shape.arrays(), float32(4), float32(1, 4, head_dim, head_dim))


# Two chunks and a ragged one, of heads that share a key head.
_SMALL = shapes.Shape(length=150, num_heads=2, num_kv_heads=1, head_dim=16)


def _check(shape, decay):
  case = oracle.draw(shape, "bfloat16", decay)
  call = lambda **arguments: api.linear_attention(
      **arguments, implementation="pallas_gpu"
  )
  oracle.check(call, case, "pallas_gpu")


@needs_new_jax
class InterpretedTest(parameterized.TestCase):

  def test_equals_the_oracle(self):
    _check(_SMALL, "mixed")

  @pytest.mark.slow
  def test_of_heads_that_fill_a_tile(self):
    _check(shapes.TESTS["single"], "slow")
    _check(shapes.TESTS["ragged_gqa"], "mixed")


@needs_new_jax
class WhyNotTest(parameterized.TestCase):

  @parameterized.parameters(
      ("float32", 64, "not float32; use implementation='xla'"),
      ("bfloat16", 192, "heads of up to 128, not of 192"),
      ("bfloat16", 128, "needs a Hopper GPU"),
  )
  def test_says_what_is_missing(self, dtype, head_dim, message):
    query = jax.ShapeDtypeStruct((1, 8, 1, head_dim), dtype)
    self.assertIn(message, pallas_gpu.why_not(query))


@needs_compiler
class CompileTest(absltest.TestCase):

  def test_no_sweep_spills_for_an_h100(self):
    reports = ptx.report([
        jobs.Job(
            "h100",
            f"{__name__}:program",
            {"head_dim": head_dim, "is_reversed": is_reversed},
        )
        for head_dim in (64, 128)
        for is_reversed in (False, True)
    ])
    for report in reports:
      (kernel,) = report.kernels
      self.assertEqual(kernel.spill_store_bytes, 0, report.job)
      self.assertGreater(kernel.num_wgmma, 0)


if __name__ == "__main__":
  absltest.main()
