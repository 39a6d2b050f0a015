"""Programs of `jax.export` for chips that are not here, and of any batch."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from kernels_pallas import implementations
from kernels_pallas.aot import chips
from kernels_pallas.aot import topology
from kernels_pallas.hardware import described
from kernels_pallas.linear_attention import api as linear_lib
from tests.kernels_pallas import modes
from tests.kernels_pallas.transformations import every_op

# What writes a cache in place has no symbolic batch.
_IN_PLACE = ("decode", "pages")
_OF_ANY_BATCH = [op for op in every_op.OPS if op not in _IN_PLACE]


def _arguments(op, batch=None):
  """The op's arrays, abstract; of a symbolic batch where one is given."""
  _, *arrays = every_op.OPS[op]
  # Matrices of an MLP have no batch.
  num = 1 if op in ("mlp", "project") else 2
  sizes = [batch or x.shape[0] for x in arrays[:num]]
  sizes += [x.shape[0] for x in arrays[num:]]
  return [
      jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
      for size, x in zip(sizes, arrays, strict=True)
  ]


def _both_passes(op, implementation):
  function = lambda x, w: every_op.OPS[op][0](implementation, x, w)
  if op in _IN_PLACE:
    return function
  loss = every_op.loss(op, implementation)
  return lambda x, w: (function(x, w), jax.grad(loss, (0, 1))(x, w))


def _symbolic():
  return jax.export.symbolic_shape("b")[0]


class PlatformTest(parameterized.TestCase):

  @parameterized.parameters(*every_op.OPS)
  @pytest.mark.by_default(5)
  def test_another_platform_has_its_kernel(self, op):
    call = jax.jit(_both_passes(op, None))
    with described.traced_for("v5e"):
      program = jax.export.export(call, platforms=["tpu"])(*_arguments(op))
    num = 1 if op in _IN_PLACE else 3
    found = program.mlir_module().count("@tpu_custom_call")
    self.assertGreaterEqual(found, num)

  @parameterized.parameters(*every_op.OPS)
  @pytest.mark.by_default(4)
  def test_without_its_chip_it_is_refused(self, op):
    if implementations.current_platform() != "cpu":
      self.skipTest("programs are traced for an accelerator here")
    arguments = _arguments(op)
    function, *_ = every_op.OPS[op]
    export = lambda name: jax.export.export(
        jax.jit(lambda x, w: function(name, x, w)), platforms=["cpu", "tpu"]
    )(*arguments)
    with self.assertRaisesRegex(ValueError, r"for cpu.*for tpu.*traced_for"):
      export(None)
    # What is asked for by name is what is meant.
    self.assertEqual(export("xla").platforms, ("cpu", "tpu"))

  def test_a_kernel_is_not_for_the_cpu(self):
    arguments = _arguments("linear")
    call = jax.jit(lambda x, w: every_op.OPS["linear"][0](None, x, w))
    with described.traced_for("v5e"):
      with self.assertRaisesRegex(ValueError, r"for tpu.*for cpu.*outside of"):
        jax.export.export(call, platforms=["cpu"])(*arguments)

  def test_unknown_chip(self):
    with self.assertRaisesRegex(ValueError, "'v9'.*one of v4, v5e"):
      described.traced_for("v9")

  @parameterized.parameters(*chips.CHIP_NAMES)
  @pytest.mark.slow
  def test_chips_are_as_their_compilers_say(self, name):
    if not topology.has_toolchain(chips.get_chip(name).platform):
      self.skipTest("its compiler is not installed")
    mesh = topology.device_mesh(chips.get_chip(name))
    with described.traced_for(name):
      found = jax.sharding.get_abstract_mesh().abstract_device
    self.assertEqual(found, mesh.abstract_mesh.abstract_device)


class SymbolicBatchTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    # A symbolic size is no `int`, whatever else it can do.
    jaxtyping.config.update("jaxtyping_disable", True)
    self.addCleanup(jaxtyping.config.update, "jaxtyping_disable", False)

  @parameterized.product(op=_OF_ANY_BATCH, is_wide=(False, True))
  @pytest.mark.by_default(4, 5)
  def test_kernels_of_any_batch(self, op, is_wide):
    call = jax.jit(_both_passes(op, None))
    with described.traced_for("v5e"), jax.enable_x64(is_wide):
      program = jax.export.export(call, platforms=["tpu"])(
          *_arguments(op, _symbolic())
      )
    found = program.mlir_module().count("@tpu_custom_call")
    self.assertGreaterEqual(found, 3)

  @parameterized.parameters(
      *[(op, "pallas_tpu") for op in _OF_ANY_BATCH],
      *[(op, "xla") for op in every_op.OPS if op != "pages"],
  )
  @pytest.mark.slow
  def test_values_and_gradients(self, op, implementation):
    call = jax.jit(_both_passes(op, implementation))
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    arrays = [draw(x) for x in _arguments(op, 3)]
    with modes.mode_of(implementation):
      program = jax.export.export(call)(*_arguments(op, _symbolic()))
      found, expected = program.call(*arrays), call(*arrays)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        found,
        expected,
    )

  @pytest.mark.slow
  def test_documents_and_lengths_of_any_batch(self):
    def attend(starts, lengths, query, key):
      return linear_lib.linear_attention(
          query, key, key, segment_starts=starts, lengths=lengths
      ).out

    query, key = every_op.OPS["linear"][1:]
    arrays = (jnp.arange(8)[None] == jnp.array([[3], [5]]), jnp.array([8, 6]))
    arrays += (query, key)
    batch = _symbolic()
    abstract = [
        jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in arrays
    ]
    program = jax.export.export(jax.jit(attend))(*abstract)
    np.testing.assert_allclose(
        program.call(*arrays), attend(*arrays), rtol=1e-5, atol=1e-6
    )

  @parameterized.product(op=_OF_ANY_BATCH, is_wide=(False, True))
  @pytest.mark.slow
  def test_it_compiles(self, op, is_wide):
    if not topology.has_toolchain("tpu"):
      self.skipTest("libtpu is not installed")
    mesh = topology.device_mesh(chips.get_chip("v5e"))
    place = jax.sharding.NamedSharding(mesh, jax.P())
    with jax.set_mesh(mesh), jax.enable_x64(is_wide):
      call = jax.jit(_both_passes(op, None))
      program = jax.export.export(call, platforms=["tpu"])(
          *_arguments(op, _symbolic())
      )
      arrays = [
          jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
          for x in _arguments(op, 3)
      ]
      lowered = jax.jit(program.call).lower(*arrays)
      text = topology.compiled(lowered).as_text()
    # A forward pass that both results share is there once.
    self.assertGreaterEqual(text.count('"tpu_custom_call"'), 2)

  @parameterized.parameters(*_IN_PLACE)
  def test_a_cache_in_place_wants_to_know_it(self, op):
    call = jax.jit(_both_passes(op, None))
    with described.traced_for("v5e"):
      with self.assertRaisesRegex(ValueError, "batch.*known.*once for each"):
        jax.export.export(call, platforms=["tpu"])(*_arguments(op, _symbolic()))

  @parameterized.parameters("linear", "delta")
  def test_no_other_axis(self, op):
    (length,) = jax.export.symbolic_shape("t")
    arguments = [
        jax.ShapeDtypeStruct((x.shape[0], length, *x.shape[2:]), x.dtype)
        for x in _arguments(op)
    ]
    call = jax.jit(_both_passes(op, None))
    with self.assertRaisesRegex(ValueError, "axis T of the symbolic size t;"):
      jax.export.export(call)(*arguments)


if __name__ == "__main__":
  absltest.main()
