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
from kernels_pallas.gather_mlp import api
from kernels_pallas.gather_mlp import heads
from kernels_pallas.gather_mlp import parts
from kernels_pallas.gather_mlp import shapes
from kernels_pallas.gather_mlp.gpu import entry as pallas_gpu
from kernels_pallas.gather_mlp.gpu import gather
from kernels_pallas.gather_mlp.gpu import scatter
from tests.kernels_pallas import conformance
from tests.kernels_pallas.gather_mlp import oracle

_SHAPE = shapes.Shape(
    batch=3,
    width=128,
    num_neurons=192,
    block_size=64,
    is_gated=True,
    has_bias=True,
)
# Without gate or biases, more sequences than an instruction has rows, columns
# that are no pair of tiles, blocks of two tiles.
_PLAIN = shapes.Shape(batch=70, width=192, num_neurons=512, block_size=128)

needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax >= 0.11"
)
needs_compiler = pytest.mark.skipif(
    not topology.has_toolchain("cuda") or shutil.which("ptxas") is None,
    reason="compiling for the H100 needs jax >= 0.11, jax-cuda13-plugin, ptxas",
)


def forward(shape, num_chosen):
  """A program of every kernel, per sequence; see `jobs.Job`."""
  sizes = shapes.BENCHMARKS[shape]
  x, weights = sizes.arrays()
  ids = jax.ShapeDtypeStruct((sizes.batch, num_chosen), jnp.int32)

  def call(x, weights, ids):
    given = {k: v for k, v in weights._asdict().items() if v is not None}
    return api.gather_mlp(
        x,
        **given,
        block_ids=ids,
        activation="silu" if sizes.is_gated else "relu",
        implementation="pallas_gpu",
    )

  return call, (x, weights, ids)


def backward(shape, num_chosen):
  """The gradients by x and weights; as `forward`."""
  call, (x, weights, ids) = forward(shape, num_chosen)

  def gradients(x, weights, ids, d_out):
    _, pullback = jax.vjp(lambda *given: call(*given, ids), x, weights)
    return pullback(d_out)

  return gradients, (x, weights, ids, x)


@needs_new_jax
class InterpretedTest(parameterized.TestCase):

  @parameterized.parameters(
      (_SHAPE, "silu", True, True, 128),
      (_SHAPE, "gelu", False, True, 2),
      (_PLAIN, "relu", True, False, 4),
  )
  @pytest.mark.slow
  def test_equals_the_oracle(
      self, shape, activation, per_sequence, is_ragged, num_blocks
  ):
    case = oracle.draw(
        shape,
        "bfloat16",
        activation,
        num_chosen=3,
        per_sequence=per_sequence,
        is_ragged=is_ragged,
        seed=1,  # Of which no list of the ragged is empty for all.
    )
    self.assertTrue(any(len(blocks) for blocks in case.lists()))
    config = pallas_gpu.Config(num_stages=2, num_blocks=num_blocks)

    def call(arrays, block_ids, num_valid):
      return api.gather_mlp(
          **arrays,
          block_ids=block_ids,
          num_valid=num_valid,
          activation=case.activation,
          block_size=case.block_size,
          implementation="pallas_gpu",
          config=config,
      )

    oracle.check(oracle.both_passes(call), case, "pallas_gpu")

  def test_results_do_not_depend_on_how_the_work_is_split(self):
    rng = np.random.default_rng(0)
    normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.bfloat16)
    plan = parts.plan_of(np.array([2, 0]), None, 3)
    arguments = (normal(5, 256), normal(192, 256), plan, 64)
    configs = (
        pallas_gpu.Config(num_stages=3, num_blocks=1),
        pallas_gpu.Config(num_stages=1, num_blocks=64),
    )
    with interpret.interpreted():
      one, other = (gather.into_rows(*arguments, c) for c in configs)
    conformance.check_equal((one,), (other,), 1e-6)

  def test_nothing_but_the_chosen_slabs(self):
    rng = np.random.default_rng(0)
    normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.bfloat16)
    hidden, few = normal(3, 192), normal(3, 128)
    # Of three entries two count; the third names a block that counts.
    plan = parts.Plan(jnp.array([2, 0, 2]), jnp.int32(2))
    call = functools.partial(scatter.outer, hidden, few, plan, 64, 4)
    with interpret.interpreted():
      found = np.asarray(call(), np.float64).reshape(4, 64, 128)
    wide = [np.asarray(x, np.float64) for x in (hidden, few)]
    products = (wide[0].T @ wide[1]).reshape(3, 64, 128)
    for block, entry in ((2, 0), (0, 1)):
      np.testing.assert_allclose(
          found[block], products[entry], rtol=2**-8, atol=2**-8
      )
    np.testing.assert_array_equal(found[[1, 3]], 0)

  @pytest.mark.slow
  def test_heads(self):
    rng = np.random.default_rng(0)
    normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.bfloat16)
    x, kernel = normal(2, 64), normal(3, 64, 64)
    ids = np.array([[2, 0], [1, 2]], np.int32)
    with interpret.interpreted():
      found = heads.project_in(x, kernel, ids, implementation="pallas_gpu")
      back = heads.project_out(found, kernel, ids, implementation="pallas_gpu")
    want = heads.project_in(x, kernel, ids, implementation="reference")
    conformance.check_equal((want,), (found,), 2**-7)
    want = heads.project_out(found, kernel, ids, implementation="reference")
    conformance.check_equal((want,), (back,), 2**-7)


class ConfigTest(parameterized.TestCase):

  @parameterized.parameters("num_stages", "num_blocks")
  def test_sizes_of_nothing(self, name):
    with self.assertRaisesRegex(ValueError, f"{name}=0 must be at least 1"):
      pallas_gpu.Config(**{name: 0})


@needs_new_jax
class WhyNotTest(parameterized.TestCase):

  @parameterized.parameters(
      ("float32", 1, 128, 64, "not float32; use implementation='xla'"),
      ("bfloat16", 1, 96, 64, "multiples of 64, not 64 and 96"),
      ("bfloat16", 1, 128, 32, "multiples of 64, not 32 and 128"),
      ("bfloat16", 129, 128, 64, "up to 128 sequences, not 129"),
      ("bfloat16", 1, 128, 64, "needs a Hopper GPU"),
  )
  def test_says_what_is_missing(self, dtype, batch, width, size, message):
    x = jax.ShapeDtypeStruct((batch, width), dtype)
    self.assertIn(message, pallas_gpu.why_not(x, size))


@needs_compiler
class CompileTest(absltest.TestCase):

  def test_no_kernel_spills_for_an_h100(self):
    for kernels in self._compiled("forward", [2, 3]):
      for kernel in kernels:
        # A tile and the sequences, for each stage ahead and in the loop.
        self.assertEqual(kernel.num_tma_loads, 2 * (6 + 1))

  def test_nor_do_those_of_the_backward_pass(self):
    # What is recomputed, two or three products back, and each gradient.
    for kernels in self._compiled("backward", [2 + 1 + 2, 3 + 2 + 3]):
      stores = sum(kernel.num_tma_stores for kernel in kernels)
      self.assertGreater(stores, 0)

  def _compiled(self, program, num_kernels):
    names = ("opt_6.7b", "llama3_8b_b16")
    program = f"{__name__}:{program}"
    found = ptx.report([
        jobs.Job("h100", program, {"shape": name, "num_chosen": 13})
        for name in names
    ])
    self.assertEqual([len(x.kernels) for x in found], num_kernels)
    for kernel in (k for report in found for k in report.kernels):
      self.assertEqual(kernel.spill_store_bytes, 0)
      self.assertGreater(kernel.num_wgmma, 0)
    return [report.kernels for report in found]


if __name__ == "__main__":
  absltest.main()
