from unittest import mock

from absl.testing import absltest

from kernels_pallas.aot import jobs
from kernels_pallas.aot import ptx
from kernels_pallas.aot import topology

# Of jax 0.11.2 and CUDA 13.0, cut.
_PTX = """
wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%r1}, %rd1;
wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%r2}, %rd2;
cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%r
cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%rd3];
cp.async.bulk.commit_group;
"""
_PTXAS = """
ptxas info    : 0 bytes gmem
    0 bytes stack frame, 680 bytes spill stores, 692 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
_RESOURCES = "Resources(smem_scratch_bytes=51200, tmem_scratch_cols=0)"


class ParseTest(absltest.TestCase):

  def test_reads_the_dumps(self):
    self.assertEqual(
        ptx.parse("entry_0", _PTX, _PTXAS, _RESOURCES),
        ptx.KernelPtx(
            name="entry_0",
            registers=168,
            spill_store_bytes=680,
            spill_load_bytes=692,
            smem_bytes=51200,
            num_wgmma=2,
            num_tma_loads=1,
            num_tma_stores=1,
        ),
    )

  def test_without_ptxas_it_says_where_to_get_it(self):
    with mock.patch.object(ptx.shutil, "which", return_value=None):
      with self.assertRaisesRegex(topology.ToolchainMissing, "ptxas"):
        ptx.report([])


@absltest.skipUnless(
    topology.has_toolchain("cuda"), "no CUDA plugin for this jax"
)
class ReportTest(absltest.TestCase):

  def test_spills_and_overflows_of_a_kernel_are_seen(self):
    program = "tests.kernels_pallas.aot.programs:gpu_scale"
    job = lambda **kwargs: jobs.Job("h100", program, kwargs)
    fits, spills, overflows = jobs.run(
        [job(rows=64), job(rows=256), job(rows=64, scratch_rows=1024)]
    )
    (kernel,) = fits["kernels"]
    self.assertEqual(kernel["spill_store_bytes"], 0)
    self.assertBetween(kernel["registers"], 64, 128)
    # 64 x 128 float32, and what the sum needs.
    self.assertBetween(kernel["smem_bytes"], 2**15, 2**15 + 2**12)
    self.assertEqual(kernel["num_tma_loads"], 1)
    # 256 x 128 float32 are 256 registers of each of 128 threads; 255 are there.
    (kernel,) = spills["kernels"]
    self.assertGreater(kernel["spill_store_bytes"], 0)
    self.assertRegex(overflows["error"], "OutOfSmem: .* of 232,448")


if __name__ == "__main__":
  absltest.main()
