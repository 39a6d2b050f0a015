"""Named shapes of a decode step: for tests, benchmarks and tuning alike."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.decode import slots as slots_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """Sizes of one call.

  Attributes:
    batch: B.
    num_heads: N, query heads.
    num_kv_heads: K, a divisor of N.
    capacity: C, slots.
    head_dim: H.
  """

  batch: int = 1
  num_heads: int
  num_kv_heads: int
  capacity: int
  head_dim: int = 128

  def arrays(
      self,
      dtype: jax.typing.DTypeLike = jnp.bfloat16,
      cache_dtype: jax.typing.DTypeLike | None = None,
      has_votes: bool = False,
  ) -> tuple[Any, ...]:
    """Abstract query, key, value, cache and positions."""
    heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
    vectors = (
        jax.ShapeDtypeStruct((self.batch, n, self.head_dim), dtype)
        for n in heads
    )
    cache = jax.eval_shape(
        lambda: slots_lib.empty(
            self.batch,
            self.num_kv_heads,
            self.capacity,
            self.head_dim,
            dtype if cache_dtype is None else cache_dtype,
            has_votes,
        )
    )
    return (*vectors, cache, jax.ShapeDtypeStruct((self.batch,), jnp.int32))


# Small enough to be interpreted: GQA, MHA, MQA, one sequence, two chunks.
TESTS = {
    "gqa": Shape(
        batch=2, num_heads=4, num_kv_heads=2, capacity=64, head_dim=32
    ),
    "mha": Shape(
        batch=3, num_heads=2, num_kv_heads=2, capacity=32, head_dim=16
    ),
    "mqa": Shape(num_heads=3, num_kv_heads=1, capacity=96, head_dim=64),
    "chunks": Shape(num_heads=8, num_kv_heads=2, capacity=256, head_dim=128),
}

# The heads of models that people run, at budgets of slots.
BENCHMARKS = {
    f"b{batch}_c{capacity}": Shape(
        batch=batch, num_heads=32, num_kv_heads=8, capacity=capacity
    )
    for batch in (1, 8, 64)
    for capacity in (512, 1024, 4096, 16_384)
}
