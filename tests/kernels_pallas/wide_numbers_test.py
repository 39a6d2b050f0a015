"""With jax_enable_x64 kernels compile, and compute, as without."""

import functools
import os
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import masks
from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.aot import topology
from kernels_pallas.attention import api
from kernels_pallas.decode import api as decode_lib
from kernels_pallas.decode import slots
from kernels_pallas.decode.paged import api as paged_lib
from kernels_pallas.gated_delta_rule import api as delta_lib
from kernels_pallas.gather_mlp import api as mlp_lib
from tests.kernels_pallas import modes

_TESTS = (
    "attention/tpu",
    "gather_mlp/tpu",
    "linear_attention/pallas_tpu_test.py",
    "decode/pallas_tpu_test.py",
    "decode/paged/pallas_tpu_test.py",
)


def _loss(query, key, lengths):
  where = masks.key_lengths(query.shape[1], lengths)
  result = api.attention(
      query, key, key, where=where, implementation="pallas_tpu"
  )
  return result.out.astype(jnp.float32).sum()


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompileTest(absltest.TestCase):

  def test_both_passes_of_attention(self):
    struct = jax.ShapeDtypeStruct
    query, key = (struct((1, 257, n, 64), jnp.bfloat16) for n in (4, 2))
    with jax.enable_x64(True):
      compiled = compile_lib.compile_for(
          "v5e",
          jax.grad(_loss, (0, 1)),
          query,
          key,
          struct((1,), jnp.int64),
      )
    self.assertLen(compiled.scoped_vmem_bytes, 2)

  @pytest.mark.slow
  def test_both_passes_of_the_gated_delta_rule(self):
    struct = lambda *shape: jax.ShapeDtypeStruct((1, 100, *shape), jnp.bfloat16)
    gate = jax.ShapeDtypeStruct((1, 100, 2), jnp.float32)
    loss = lambda *arrays: delta_lib.gated_delta_rule(
        *arrays, implementation="pallas_tpu"
    ).out.sum()
    with jax.enable_x64(True):
      compiled = compile_lib.compile_for(
          "v5e",
          jax.grad(loss, (0, 1, 2, 3, 4)),
          struct(1, 64),
          struct(1, 64),
          struct(2, 32),
          gate,
          gate,
      )
    # The states of the chunks' starts, and the way back.
    self.assertLen(compiled.scoped_vmem_bytes, 2)

  @pytest.mark.slow
  def test_what_stands_beside_the_arrays(self):
    """Sinks, weights of rows and biases that have 64 bits."""
    struct = jax.ShapeDtypeStruct
    vectors = lambda *shape: struct(shape, jnp.bfloat16)
    wide = lambda *shape: struct(shape, jnp.float64)

    def attend(query, sink, weights):
      result = api.attention(
          query,
          query,
          query,
          sink_logits=sink,
          row_weights=weights,
          return_col_mass=True,
          implementation="pallas_tpu",
      )
      return result.out.sum(), result.col_mass

    def mlp(x, up, bias):
      return mlp_lib.gather_mlp(
          x,
          up,
          up,
          np.array([1]),
          up_bias=bias,
          gate=up,
          gate_bias=bias,
          implementation="pallas_tpu",
      ).sum()

    arrays = vectors(1, 300, 2, 64), wide(2), wide(1, 2, 300)
    with jax.enable_x64(True):
      gradients = jax.grad(attend, (0, 1), has_aux=True)
      compiled = compile_lib.compile_for("v5e", gradients, *arrays)
      self.assertLen(compiled.scoped_vmem_bytes, 2)
      arrays = vectors(4, 80), vectors(256, 80), wide(256)
      gradients = jax.grad(mlp, (0, 1, 2))
      compiled = compile_lib.compile_for("v5e", gradients, *arrays)
      self.assertLen(compiled.scoped_vmem_bytes, 1)

  @pytest.mark.slow
  def test_all_that_compiles_for_the_v5e(self):
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    paths = [f"tests/kernels_pallas/{name}" for name in _TESTS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "CompileTest"]
        + paths,
        env=environment,
        capture_output=True,
        text=True,
    )
    self.assertEqual(done.returncode, 0, done.stdout[-4000:])
    self.assertIn("passed", done.stdout)


class ValuesTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_gradients_and_their_types(self):
    query, key = (jnp.ones((1, 8, n, 16), jnp.float32) for n in (2, 1))
    query += jnp.arange(16, dtype=jnp.float32)[None, None, None]
    with modes.mode_of("pallas_tpu"):
      narrow = jax.jit(jax.grad(_loss, (0, 1)))(query, key, jnp.array([5]))
      with jax.enable_x64(True):
        wide = jax.jit(jax.grad(_loss, (0, 1)))(query, key, jnp.array([5]))
    for one, two in zip(narrow, wide, strict=True):
      self.assertEqual(two.dtype, jnp.float32)
      np.testing.assert_array_equal(one, two)

  @parameterized.parameters("xla", "pallas_tpu")
  @pytest.mark.slow
  def test_the_gated_delta_rule(self, implementation):
    vectors = jnp.ones((1, 20, 1, 16), jnp.float32) / 4
    gates = jnp.full((1, 20, 1), 0.5)
    starts, lengths = jnp.arange(20)[None] == 7, jnp.array([17])

    def both(query):
      result, pullback = jax.vjp(
          lambda x: delta_lib.gated_delta_rule(
              x,
              vectors,
              vectors,
              -gates,
              gates,
              segment_starts=starts,
              lengths=lengths,
              implementation=implementation,
          ),
          query,
      )
      return result, pullback(result)

    with modes.mode_of(implementation):
      narrow = jax.jit(both)(vectors)
      with jax.enable_x64(True):
        wide = jax.jit(both)(vectors)
    for one, two in zip(*map(jax.tree.leaves, (narrow, wide)), strict=True):
      self.assertEqual(two.dtype, jnp.float32)
      np.testing.assert_array_equal(one, two)

  @pytest.mark.slow
  def test_decode_steps(self):
    query, key = (jnp.ones((1, n, 16), jnp.float32) for n in (2, 1))
    cache, at = slots.empty(1, 1, 16, 16), jnp.zeros(1, jnp.int32)
    step = lambda: decode_lib.decode_step(
        query, key, key, cache, at, implementation="pallas_tpu"
    )
    with modes.mode_of("pallas_tpu"):
      narrow = step()
      with jax.enable_x64(True):
        wide = step()
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)

  @parameterized.parameters("decode", "pages")
  @pytest.mark.slow
  def test_positions_and_tables_of_64_bits(self, op):
    query, key = (jnp.ones((2, n, 16), jnp.float32) for n in (2, 1))
    cache = slots.empty(2, 1, 16, 16)
    call = functools.partial(decode_lib.decode_step, query, key, key, cache)
    wholes = [np.array([0, -1])]
    if op == "pages":
      pool = jax.tree.map(lambda x: x[:, 0], cache)
      call = lambda at, table, num: paged_lib.decode_step(
          query, key, key, pool, table, num, at
      )
      wholes += [np.array([[1], [0]]), np.array([1, 1])]
    narrow = call(*(jnp.asarray(x, jnp.int32) for x in wholes))
    with jax.enable_x64(True):
      wide = call(*(jnp.asarray(x, jnp.int64) for x in wholes))
    self.assertEqual(narrow[-1].tolist(), [[0], [-1]])
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)
    types = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
    self.assertEqual(types(wide), types(narrow))


if __name__ == "__main__":
  absltest.main()
