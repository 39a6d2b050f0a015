from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from joma.transformer import hooks
from joma.transformer import sharding
from joma.transformer.weighing import in_parts
from joma.transformer.weighing import merged
from kernels_pallas import masks

_OPTIONS = hooks.AttentionOptions(scale=0.5)
_RETURNS = {"return_lse": True, "return_col_mass": True}


def _mesh(*sizes):
  auto = (jax.sharding.AxisType.Auto,) * 4
  return jax.sharding.AbstractMesh(sizes, sharding.AXES, axis_types=auto)


class InPartsTest(parameterized.TestCase):

  @parameterized.parameters(
      # Sequences of 2, key heads of 2; and what does not divide is whole.
      ((2, 1, 2, 1), 4, 2, 13),
      ((1, 2, 1, 4), 4, 2, 13),
      ((1, 1, 4, 2), 3, 2, 13),
      ((1, 1, 1, 8), 1, 1, 5),
  )
  def test_shapes_are_those_of_one_device(
      self, sizes, batch, num_kv_heads, length
  ):
    query = jax.ShapeDtypeStruct((batch, length, 4, 8), np.float32)
    key = jax.ShapeDtypeStruct((batch, length, num_kv_heads, 8), np.float32)
    ids = jnp.zeros((batch, length), jnp.int32)
    for where in (masks.causal(length), masks.document(ids)):
      run = lambda op, where: lambda q, k: op(
          q, k, k, where, _OPTIONS, **_RETURNS
      )
      wanted = jax.eval_shape(run(merged.attend, where), query, key)
      with jax.sharding.use_abstract_mesh(_mesh(*sizes)):
        found = jax.eval_shape(run(in_parts.attend, where), query, key)
      self.assertEqual(found, wanted)

  def test_without_a_mesh_it_is_the_op(self):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 2, 8)))
    x, where = x.astype(jnp.float32), masks.causal(6)
    weights = jnp.arange(6.0)[None, None]
    found, wanted = (
        attend(x, x, x, where, _OPTIONS, row_weights=weights, **_RETURNS)
        for attend in (in_parts.attend, merged.attend)
    )
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


if __name__ == "__main__":
  absltest.main()
