import functools

from absl.testing import absltest
from absl.testing import parameterized
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.decode import api
from kernels_pallas.decode import shapes
from tests.kernels_pallas.decode import oracle


class MemoryTest(parameterized.TestCase):
  """Of compiled programs that are not run."""

  @parameterized.parameters("float32", "int8")
  def test_a_donated_cache_is_updated_in_place(self, cache_dtype):
    shape = shapes.Shape(
        batch=2, num_heads=4, num_kv_heads=4, capacity=2048, head_dim=128
    )
    arrays = shape.arrays(jnp.float32, cache_dtype)
    step = functools.partial(api.decode_step, implementation="xla")
    memory = (
        jax.jit(step, donate_argnums=3)
        .lower(*arrays)
        .compile()
        .memory_analysis()
    )
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays[3])]
    self.assertEqual(memory.alias_size_in_bytes, sum(sizes))
    # A head of eight, twice in float32, and logits.
    self.assertLess(memory.temp_size_in_bytes, 1.2 * 2 * 2048 * 128 * 4)


_SHAPE = shapes.Shape(
    batch=2, num_heads=4, num_kv_heads=2, capacity=12, head_dim=8
)
_OPTIONS = {"num_sinks": 1, "num_recent": 3, "window": 15}


class AnyTokensTest(parameterized.TestCase):

  @hypothesis.given(
      st.integers(0, 10**6), st.sampled_from(("sum", "mean", "ema"))
  )
  @hypothesis.settings(max_examples=8, deadline=None)
  @pytest.mark.slow
  def test_equals_the_oracle(self, seed, score):
    case = oracle.draw(_SHAPE, 30, seed=seed)
    options = _OPTIONS | {"score": score, "decay": 0.8}
    expected = oracle.decode(case, **options)
    oracle.check(case, oracle.run(case, "xla", **options), expected)


if __name__ == "__main__":
  absltest.main()
