import dataclasses
import functools

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
from kernels_pallas.attention import visits
from kernels_pallas.attention.tpu import backward
from kernels_pallas.attention.tpu import backward_plan as plan_lib
from kernels_pallas.attention.tpu import backward_sums as sums_lib
from kernels_pallas.transformations import manual_axes
from tests.kernels_pallas.attention.tpu import backward_cases as cases

_MIB = 1 << 20


class PlanTest(parameterized.TestCase):

  def test_parts_are_as_few_as_fit_and_chunks_are_even(self):
    # 9 tiles of which 4 would fit: 3 chunks, of 3 rather than 4, 4 and 1.
    case = dataclasses.replace(cases.GROUP, num_queries=9 * 128, num_kv_heads=4)
    limit = sum(cases.plan_of(case, heads=1, chunk=5).vmem().values()) - 1
    plan = cases.plan_of(case, heads=1, chunk=9)
    rest = {"num_spans": 1, "has_ids": False, "limit": limit, "num_cores": 1}
    plan = plan_lib.make(plan.sizes, plan.tiles, **rest)
    self.assertEqual((plan.heads, plan.chunk, plan.num_parts), (1, 3, 3))

  def test_tiles_that_do_not_fit_are_refused_with_the_arithmetic(self):
    case = dataclasses.replace(cases.Case(), limit=_MIB)
    with self.assertRaisesRegex(
        ValueError,
        r"128 queries and 128 keys with head_dim=32 take 1\.\d\d MiB of VMEM .*"
        r" for a tile of logits.* of which 1\.00 MiB may be taken",
    ):
      cases.both_gradients(case)

  def test_tiles_that_are_no_multiple_of_lanes_are_refused(self):
    with self.assertRaisesRegex(ValueError, "block_q=64 must be a multiple"):
      cases.both_gradients(cases.Case(block_q=64))

  @parameterized.product(
      num_cores=(1, 2), num_heads=(1, 2, 5, 8, 32), num_kv_heads=(1, 2, 8)
  )
  def test_sums_are_small_beside_the_arrays(
      self, num_cores, num_heads, num_kv_heads
  ):
    if num_heads % num_kv_heads:
      self.skipTest("no whole groups")
    case = cases.Case(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_queries=1 << 17,
        num_keys=1 << 17,
        head_dim=128,
        block_q=512,
        block_kv=512,
        num_cores=num_cores,
    )
    for dtype in (jnp.bfloat16, jnp.float32):
      plan = cases.plan_of(case, dtype, heads=1, chunk=16)
      outputs = sums_lib.outputs(plan, jnp.dtype(dtype))
      taken = sum(x.size * x.dtype.itemsize for x in outputs)
      keys, queries = (
          2 * n * (1 << 17) * 128 * jnp.dtype(dtype).itemsize
          for n in (num_kv_heads, num_heads)
      )
      # Two of them are dK and dV.
      is_shared = plan.num_sums > 1
      temporary = taken if is_shared else taken - keys
      self.assertLessEqual(temporary, 0.75 * (keys + queries))

  def test_cost_is_that_of_visited_tiles(self):
    case = cases.GROUP
    plan = cases.plan_of(case, jnp.bfloat16, heads=4, chunk=3)
    columns = visits.by_key(visits.states_of(case.mask, 384, 384, 128, 128))
    cost = plan_lib.cost(plan, columns)
    # By hand: 6 of the 9 tiles of 4 heads; 5 products of 2 * 32 FLOPs.
    self.assertEqual(cost.transcendentals, 4 * 6 * 128 * 128)
    self.assertEqual(cost.flops, 5 * 2 * 32 * 4 * 6 * 128 * 128)
    # Q, dO, dQ of 4 heads; K, V, dK, dV of one; lse and delta in float32.
    queries, keys = 4 * 384 * 32 * 2, 384 * 32 * 2
    self.assertEqual(
        cost.bytes_accessed, 3 * queries + 4 * keys + 2 * 4 * 384 * 4
    )
    traced = jax.tree.map(jnp.asarray, columns)
    self.assertEqual(
        plan_lib.cost(plan, traced).transcendentals, 4 * 9 * 128 * 128
    )


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompileTest(parameterized.TestCase):

  @parameterized.parameters("v4", "v5e", "v5p", "v6e", "v7x")
  @pytest.mark.slow
  def test_every_chip_takes_what_the_plan_calls_fitting(self, chip):
    # As many queries as the plan puts into 15/16 of the smaller memories.
    self._compile(chip, cases.Case(mask=masks.causal(32_768), head_dim=128))

  @parameterized.named_parameters(
      ("float32", cases.Case(num_heads=1, num_kv_heads=1), jnp.float32),
      ("head_dim_64", cases.Case(head_dim=64, num_heads=8), jnp.bfloat16),
      ("head_dim_256", cases.Case(head_dim=256), jnp.bfloat16),
      (
          "ids_and_2_spans",
          cases.Case(
              mask=dataclasses.replace(
                  masks.streaming(4096, window=700, num_sinks=9),
                  query_ids=np.zeros(4096, np.int32),
                  key_ids=np.zeros(4096, np.int32),
              ),
              soft_cap=30.0,
          ),
          jnp.bfloat16,
      ),
  )
  @pytest.mark.slow
  def test_the_smallest_memory_takes(self, case, dtype):
    case = dataclasses.replace(case, head_dim=max(case.head_dim, 64))
    self._compile("v4", case, dtype)

  @parameterized.parameters(
      ("v4", 131_072, 5, 1), ("v4", 32_768, 32, 32), ("v5e", 65_536, 16, 8)
  )
  @pytest.mark.slow
  def test_temporaries_of_both_passes_are_smaller_than_the_arrays(
      self, chip, length, num_heads, num_kv_heads
  ):
    query, key = (
        jax.ShapeDtypeStruct((1, length, n, 128), jnp.bfloat16)
        for n in (num_heads, num_kv_heads)
    )

    def gradients(query, key, value, d_out):
      attend = lambda *arrays: api.attention(
          *arrays, where=masks.causal(length), implementation="pallas_tpu"
      ).out
      return jax.vjp(attend, query, key, value)[1](d_out)

    arrays = (query, key, key, query)
    compiled = compile_lib.compile_for(chip, gradients, *arrays)
    size = sum(x.size * x.dtype.itemsize for x in arrays)
    self.assertLess(compiled.temp_bytes, size)

  def _compile(self, chip, case, dtype=jnp.bfloat16):
    length = 4096 if case.mask is None else case.mask.starts.shape[-1]
    mask = case.mask or masks.full(length, length)
    blocks = {"block_q": 512, "block_kv": 512}
    columns = visits.by_key(visits.states_of(mask, length, length, 512, 512))
    heads = (case.num_heads, case.num_kv_heads)
    query, key = (
        jax.ShapeDtypeStruct((2, n, length, case.head_dim), dtype)
        for n in heads
    )
    lse = jax.ShapeDtypeStruct((2, heads[0], length), jnp.float32)

    def call(query, key, value, lse, delta, d_out):
      ids = (
          x if x is None else x[None] for x in (mask.query_ids, mask.key_ids)
      )
      return backward.backward(
          query,
          key,
          value,
          columns,
          (mask.starts[None], mask.stops[None]),
          *ids,
          lse,
          delta,
          d_out,
          scale=0.1,
          logits_soft_cap=case.soft_cap,
          **blocks,
      )

    # As the op calls it, also with jax_enable_x64.
    narrow = functools.partial(manual_axes.isolated, call, is_narrow=True)
    compiled = compile_lib.compile_for(
        chip, narrow, query, key, key, lse, lse, query
    )
    self.assertEqual(compiled.num_custom_calls, 1)
    (name,) = compiled.scoped_vmem_bytes
    self.assertIn("attention_backward", name)


if __name__ == "__main__":
  absltest.main()
