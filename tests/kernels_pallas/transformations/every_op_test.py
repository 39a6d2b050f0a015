"""shard_map as jax has it by default, forward mode and second derivatives."""

from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from kernels_pallas.transformations import partitions
from tests.kernels_pallas import modes
from tests.kernels_pallas.transformations import every_op

_EXPLICIT = jax.sharding.AxisType.Explicit
_VARIANTS = [
    (op, implementation)
    for op in every_op.OPS
    for implementation in ("xla", "pallas_tpu")
]


class ShardMapTest(parameterized.TestCase):

  @parameterized.parameters(*_VARIANTS)
  @pytest.mark.by_default(2)
  def test_its_check_is_on_by_default(self, op, implementation):
    function, *arrays = every_op.OPS[op]
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    # Of the arrays one is split and one is shared, so that they vary unlike.
    split = lambda f, out: jax.shard_map(
        f, mesh=mesh, in_specs=(P("d"), P()), out_specs=out
    )
    call = lambda x, w: function(implementation, x, w)
    shared = lambda x, w: jax.lax.psum(
        every_op.loss(op, implementation)(x, w), "d"
    )
    loss = every_op.loss(op, implementation)
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
    query, key = every_op.OPS["attention"][1:]
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    several = jax.vmap(lambda x: every_op.OPS["attention"][0]("xla", x, key))
    found = jax.shard_map(
        several, mesh=mesh, in_specs=P(None, "d"), out_specs=P(None, "d")
    )(jnp.stack([query, 2 * query]))
    expected = several(jnp.stack([query, 2 * query]))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


class TracersTest(parameterized.TestCase):

  @parameterized.parameters(*_VARIANTS)
  @pytest.mark.slow
  def test_none_outlives_its_trace(self, op, implementation):
    """The rule of a derivative does, and what it holds with it."""
    function, *arrays = every_op.OPS[op]
    calls = [lambda x, w: function(implementation, x, w)]
    if "decode" not in function.__name__:
      calls.append(jax.grad(every_op.loss(op, implementation)))
    with modes.mode_of(implementation), jax.checking_leaks():
      for call in calls:
        jax.eval_shape(jax.jit(call), *arrays)


class ExplicitAxesTest(parameterized.TestCase):

  @parameterized.parameters(*_VARIANTS)
  @pytest.mark.by_default(0, 11)
  def test_they_are_refused(self, op, implementation):
    function, x, w = every_op.OPS[op]
    mesh = jax.make_mesh((1,), ("d",), axis_types=(_EXPLICIT,))
    call = lambda x: function(implementation, x, w)
    with modes.mode_of(implementation), jax.set_mesh(mesh):
      x = jax.device_put(x, jax.NamedSharding(mesh, P("d")))
      with self.assertRaisesRegex(ValueError, r"explicit axes \(d\).*Auto"):
        jax.jit(call)(x)

  @parameterized.parameters(*every_op.OPS)
  @pytest.mark.by_default(2)
  def test_xla_runs_where_they_split_nothing(self, op):
    function, *arrays = every_op.OPS[op]
    call = jax.jit(lambda *arrays: function("xla", *arrays))
    expected = call(*arrays)
    mesh = jax.make_mesh((1,), ("d",), axis_types=(_EXPLICIT,))
    with jax.set_mesh(mesh):
      np.testing.assert_array_equal(call(*arrays), expected)


class DerivativesTest(parameterized.TestCase):

  @parameterized.parameters(*_VARIANTS)
  @pytest.mark.by_default(1)
  def test_forward_mode_is_refused_or_right(self, op, implementation):
    function, x, w = every_op.OPS[op]
    call = lambda x: function(implementation, x, w)
    if op in ("decode", "pages") and implementation == "xla":
      self.skipTest("XLA's implementation is jax's to differentiate")
    with modes.mode_of(implementation):
      with self.assertRaisesRegex(ValueError, r"has no.*derivative.*'referen"):
        jax.jvp(call, (x,), (x,))

  @parameterized.parameters("linear", "attention", "mlp", "project")
  @pytest.mark.by_default(1)
  def test_a_second_derivative_of_kernels_is_refused(self, op):
    _, x, w = every_op.OPS[op]
    loss = every_op.loss(op, "pallas_tpu")
    second = jax.grad(lambda x: (jax.grad(loss)(x, w) ** 2).sum())
    with modes.mode_of("pallas_tpu"):
      with self.assertRaisesRegex(ValueError, "by implementation='pallas_tpu'"):
        second(x)

  @parameterized.parameters("linear", "attention", "mlp", "project", "delta")
  @pytest.mark.by_default(0)
  def test_so_it_is_within_a_loop(self, op):
    """Where jax forgets the rule of what the loop calls."""
    function, x, w = every_op.OPS[op]

    def loss(x):
      add = lambda carry, _: (carry + function("pallas_tpu", carry, w).sum(), 0)
      return jax.lax.scan(add, x, None, length=2)[0].sum()

    second = jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum())
    with modes.mode_of("pallas_tpu"):
      with self.assertRaisesRegex(ValueError, "by implementation='pallas_tpu'"):
        second(x)

  @parameterized.parameters("mlp", "project", "attention_by_data")
  @pytest.mark.by_default(2)
  def test_a_second_derivative_of_loops_by_data_is_refused(self, op):
    _, x, w = every_op.OPS[op]
    loss = every_op.loss(op, "xla")
    with self.assertRaisesRegex(ValueError, "by implementation='xla'"):
      jax.grad(lambda x: (jax.grad(loss)(x, w) ** 2).sum())(x)

  @parameterized.product(op=("attention", "linear"), is_split=(False, True))
  @pytest.mark.slow
  def test_a_second_derivative_of_xla_is_right(self, op, is_split):
    # As in a program of several devices, which may split the call.
    self.enter_context(
        mock.patch.object(partitions, "are_possible", lambda: is_split)
    )
    _, x, w = every_op.OPS[op]
    second = lambda implementation: jax.jit(
        jax.grad(
            lambda x: (
                jax.grad(every_op.loss(op, implementation))(x, w) ** 2
            ).sum()
        )
    )(x)
    found, expected = second("xla"), second("reference")
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * scale)


if __name__ == "__main__":
  absltest.main()
