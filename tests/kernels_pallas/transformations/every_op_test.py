"""shard_map as jax has it by default, forward mode and second derivatives."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from kernels_pallas import masks
from kernels_pallas.attention import api as attention_lib
from kernels_pallas.decode import api as decode_lib
from kernels_pallas.decode import slots
from kernels_pallas.decode.paged import api as paged_lib
from kernels_pallas.gated_delta_rule import api as delta_lib
from kernels_pallas.gather_mlp import api as mlp_lib
from kernels_pallas.gather_mlp import heads as heads_lib
from kernels_pallas.linear_attention import api as linear_lib
from tests.kernels_pallas import modes

_DRAW = np.random.default_rng(0)
_normal = lambda *shape: jnp.asarray(_DRAW.standard_normal(shape), jnp.float32)
_IDS = np.array([1, 0], np.int32)


def _attend(implementation, query, key):
  result = attention_lib.attention(
      query,
      key,
      key,
      where=masks.causal(8),
      return_col_mass=True,
      implementation=implementation,
  )
  return result.out


def _attend_by_data(implementation, query, key):
  lengths = jnp.full(query.shape[0], 5) + query.astype(jnp.int32)[:, 0, 0, 0]
  return attention_lib.attention(
      query,
      key,
      key,
      where=masks.key_lengths(8, jnp.clip(lengths, 1, 8)),
      sink_logits=jnp.ones(2),
      implementation=implementation,
  ).out


def _linear(implementation, query, key):
  return linear_lib.linear_attention(
      query, key, key, decay=jnp.full(2, 0.9), implementation=implementation
  ).out


def _delta(implementation, value, key):
  gates = jnp.full(value.shape[:3], 0.5)
  return delta_lib.gated_delta_rule(
      key, 0.3 * key, value, -gates, gates, implementation=implementation
  ).out


def _mlp(implementation, x, up):
  return mlp_lib.gather_mlp(
      x, up, up, _IDS, block_size=128, implementation=implementation
  )


def _project(implementation, x, kernel):
  into = heads_lib.project_in(x, kernel, _IDS, implementation=implementation)
  return heads_lib.project_out(
      into, kernel, _IDS, implementation=implementation
  )


def _decode(implementation, query, key):
  cache = slots.empty(2, 1, 16, 16)
  positions = jnp.zeros(2, jnp.int32)
  out, *_ = decode_lib.decode_step(
      query, key, key, cache, positions, implementation=implementation
  )
  return out


def _decode_pages(implementation, query, key):
  pool = jax.tree.map(lambda x: x[:, 0], slots.empty(2, 1, 16, 16))
  table, ones = jnp.arange(2, dtype=jnp.int32), jnp.ones(2, jnp.int32)
  out, *_ = paged_lib.decode_step(
      query,
      key,
      key,
      pool,
      table[:, None],
      ones,
      0 * ones,
      implementation=implementation,
  )
  return out


# Op -> what it computes of an implementation and two arrays, and those: one is
# split over the mesh, the other is shared.
_OPS = {
    "attention": (_attend, _normal(2, 8, 2, 16), _normal(2, 8, 1, 16)),
    "attention_by_data": (
        _attend_by_data,
        _normal(2, 8, 2, 16),
        _normal(2, 8, 1, 16),
    ),
    "linear": (_linear, _normal(2, 8, 2, 16), _normal(2, 8, 1, 16)),
    "mlp": (_mlp, _normal(2, 128), _normal(256, 128)),
    "project": (_project, _normal(2, 128), _normal(2, 16, 128)),
    "decode": (_decode, _normal(2, 2, 16), _normal(2, 1, 16)),
    "pages": (_decode_pages, _normal(2, 2, 16), _normal(2, 1, 16)),
    "delta": (_delta, _normal(2, 8, 2, 16), _normal(2, 8, 1, 16)),
}
_VARIANTS = [
    (op, implementation)
    for op in _OPS
    for implementation in ("xla", "pallas_tpu")
]


def _loss(op, implementation):
  function = _OPS[op][0]
  return lambda x, w: (function(implementation, x, w) ** 2).sum()


class ShardMapTest(parameterized.TestCase):

  @parameterized.parameters(*_VARIANTS)
  @pytest.mark.by_default(2)
  def test_its_check_is_on_by_default(self, op, implementation):
    function, *arrays = _OPS[op]
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    # Of the arrays one is split and one is shared, so that they vary unlike.
    split = lambda f, out: jax.shard_map(
        f, mesh=mesh, in_specs=(P("d"), P()), out_specs=out
    )
    call = lambda x, w: function(implementation, x, w)
    shared = lambda x, w: jax.lax.psum(_loss(op, implementation)(x, w), "d")
    loss = _loss(op, implementation)
    run = lambda f: jax.jit(f)(*arrays)
    with modes.mode_of(implementation):
      found, expected = run(split(call, P("d"))), run(call)
      np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
      if "decode" in function.__name__:
        return
      # Gradients of the map, and gradients inside of it.
      expected = run(jax.grad(loss, (0, 1)))
      outside = run(jax.grad(split(shared, P()), (0, 1)))
      inside = run(split(jax.grad(shared, (0, 1)), (P("d"), P())))
    for found in (outside, inside):
      for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-4)

  @pytest.mark.slow
  def test_vmap_inside(self):
    query, key = _OPS["attention"][1:]
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    several = jax.vmap(lambda x: _attend("xla", x, key))
    found = jax.shard_map(
        several, mesh=mesh, in_specs=P(None, "d"), out_specs=P(None, "d")
    )(jnp.stack([query, 2 * query]))
    expected = several(jnp.stack([query, 2 * query]))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


class DerivativesTest(parameterized.TestCase):

  @parameterized.parameters(*_VARIANTS)
  @pytest.mark.by_default(1)
  def test_forward_mode_is_refused_or_right(self, op, implementation):
    function, x, w = _OPS[op]
    call = lambda x: function(implementation, x, w)
    if op in ("decode", "pages") and implementation == "xla":
      self.skipTest("XLA's implementation is jax's to differentiate")
    with modes.mode_of(implementation):
      with self.assertRaisesRegex(ValueError, r"has no.*derivative.*'referen"):
        jax.jvp(call, (x,), (x,))

  @parameterized.parameters("linear", "attention", "mlp", "project")
  @pytest.mark.by_default(1)
  def test_a_second_derivative_of_kernels_is_refused(self, op):
    _, x, w = _OPS[op]
    loss = _loss(op, "pallas_tpu")
    second = jax.grad(lambda x: (jax.grad(loss)(x, w) ** 2).sum())
    with modes.mode_of("pallas_tpu"):
      with self.assertRaisesRegex(ValueError, "by implementation='pallas_tpu'"):
        second(x)

  @parameterized.parameters("mlp", "project", "attention_by_data")
  @pytest.mark.by_default(2)
  def test_a_second_derivative_of_loops_by_data_is_refused(self, op):
    _, x, w = _OPS[op]
    loss = _loss(op, "xla")
    with self.assertRaisesRegex(ValueError, "by implementation='xla'"):
      jax.grad(lambda x: (jax.grad(loss)(x, w) ** 2).sum())(x)

  @parameterized.parameters("attention", "linear")
  @pytest.mark.slow
  def test_a_second_derivative_of_xla_is_right(self, op):
    _, x, w = _OPS[op]
    second = lambda implementation: jax.jit(
        jax.grad(
            lambda x: (jax.grad(_loss(op, implementation))(x, w) ** 2).sum()
        )
    )(x)
    found, expected = second("xla"), second("reference")
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * scale)


if __name__ == "__main__":
  absltest.main()
