from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp

from kernels_pallas import output
from kernels_pallas.attention import api
from tests import draws


class MergeTest(parameterized.TestCase):

  def _parts(self, *arrays, pieces):
    def attend(query, key, value):
      return [
          api.attention(
              query,
              key[:, piece],
              value[:, piece],
              return_lse=True,
              implementation="xla",
          )
          for piece in pieces
      ]

    return jax.jit(attend)(*arrays)

  def test_parts_make_the_whole_in_value_and_gradient(self):
    arrays = draws.normal(0, 3, 2, 60, 2, 16)
    pieces = (slice(0, 7), slice(7, 40), slice(40, 60))

    def merged(*arrays):
      return output.merge(*self._parts(*arrays, pieces=pieces)).out

    def whole(*arrays):
      return api.attention(*arrays, implementation="reference").out

    weights = draws.normal(1, 2, 60, 2, 16)
    for one, two in zip(
        *(
            jax.jit(
                jax.value_and_grad(
                    lambda *a, fn=fn: (fn(*a) * weights).sum(),
                    argnums=(0, 1, 2),
                )
            )(*arrays)
            for fn in (merged, whole)
        ),
        strict=True,
    ):
      chex.assert_trees_all_close(one, two, atol=3e-5, rtol=1e-5)

  def test_is_associative_and_commutative(self):
    arrays = draws.normal(0, 3, 1, 30, 1, 8)
    a, b, c = self._parts(
        *arrays, pieces=(slice(0, 5), slice(5, 20), slice(20, 30))
    )
    merge = jax.jit(output.merge)
    chex.assert_trees_all_close(
        merge(merge(c, a), b), merge(a, b, c), atol=1e-6
    )

  def test_parts_without_keys_add_nothing(self):
    arrays = draws.normal(0, 3, 1, 8, 1, 4)
    (part,) = self._parts(*arrays, pieces=(slice(0, 8),))
    empty = output.AttentionOutput(
        jnp.zeros_like(part.out), jnp.full_like(part.lse, -jnp.inf)
    )
    merge = jax.jit(output.merge)
    chex.assert_trees_all_close(merge(empty, part), part, atol=1e-6)
    both = merge(empty, empty)
    chex.assert_trees_all_equal(both, empty)

  def test_needs_lse(self):
    arrays = draws.normal(0, 3, 1, 8, 1, 4)
    part = api.attention(*arrays, implementation="reference")
    with self.assertRaisesRegex(ValueError, "return_lse=True"):
      output.merge(part)


if __name__ == "__main__":
  absltest.main()
