import dataclasses
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
from jax.experimental import checkify
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import implementations
from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import api
from kernels_pallas.attention import cost
from kernels_pallas.attention import reference
from kernels_pallas.attention import shapes
from tests import draws
from tests.kernels_pallas import conformance
from tests.kernels_pallas import modes

_IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")
_ALL = conformance.Options(
    soft_cap=3.0, scale=0.3, has_sinks=True, has_row_weights=True
)
_PLAIN = conformance.Options()
_CASES = (
    ("ragged_gqa", "float32", _ALL),
    ("cross_mqa", "float32", _PLAIN),
    ("cross_mqa", "bfloat16", _ALL),
    ("long", "bfloat16", _PLAIN),
    ("long", "float32", _PLAIN),
)


def _select(shape, seed=0):
  """Heavy hitters of random masses: another list for every head and row."""
  dense = shape.dense
  sizes = (dense.num_queries, dense.num_keys)
  offset = dense.num_keys - dense.num_queries
  col_mass = jax.random.uniform(
      jax.random.key(seed), (dense.batch, dense.num_heads, dense.num_keys)
  )
  return selection_lib.heavy_hitters(
      col_mass,
      masks.causal(*sizes, offset=offset),
      num_queries=dense.num_queries,
      num_heavy=shape.num_heavy,
      block_q=shape.block_q,
      block_kv=shape.block_kv,
      always=masks.sliding_window(*sizes, window=shape.window, offset=offset),
  )


def _random_selection(seed, num_queries, num_keys, block_q, block_kv, heads=2):
  """Any blocks in any order, rows without blocks too, garbage behind them."""
  rng = np.random.default_rng(seed)
  rows, blocks = -(-num_queries // block_q), -(-num_keys // block_kv)
  table = np.stack(
      [rng.permutation(blocks) for _ in range(heads * rows)]
  ).reshape(1, heads, rows, blocks)
  num_valid = rng.integers(0, blocks + 1, (1, heads, rows))
  garbage = np.arange(blocks) >= num_valid[..., None]
  table = np.where(garbage, 12345, table)
  return selection_lib.Selection(
      jnp.asarray(table, jnp.int32),
      jnp.asarray(num_valid, jnp.int32),
      None,
      block_q,
      block_kv,
  )


def _run_case(implementation, name, dtype, options):
  shape = shapes.SELECTION_TESTS[name]
  chosen = _select(shape)
  allowed = reference.allowed_pairs(
      chosen, shape.dense.num_queries, shape.dense.num_keys
  )
  inputs = conformance.draw(shape.dense, dtype, np.asarray(allowed), options)

  def call(**arguments):
    return api.attention(
        **arguments, where=chosen, implementation=implementation
    )

  conformance.check(call, inputs, implementation)


class BlockSparseAttentionTest(parameterized.TestCase):

  @parameterized.product(implementation=_IMPLEMENTATIONS, case=_CASES)
  @pytest.mark.slow
  def test_equals_the_oracle(self, implementation, case):
    _run_case(implementation, *case)

  @parameterized.parameters(*_IMPLEMENTATIONS)
  @pytest.mark.slow
  def test_any_table_in_any_order(self, implementation):
    chosen = _random_selection(1, 160, 300, 32, 128)
    allowed = np.asarray(reference.allowed_pairs(chosen, 160, 300))
    self.assertFalse(allowed.any(axis=-1).all())  # Some rows have no key.
    shape = shapes.Shape(
        num_queries=160, num_keys=300, num_heads=2, num_kv_heads=1, head_dim=64
    )
    inputs = conformance.draw(shape, "float32", allowed, _PLAIN)

    def call(**arguments):
      return api.attention(
          **arguments, where=chosen, implementation=implementation
      )

    conformance.check(call, inputs, implementation)

  @parameterized.parameters(*_IMPLEMENTATIONS)
  @pytest.mark.slow
  def test_all_blocks_are_dense_attention(self, implementation):
    query, key, value = draws.normal(0, 3, 1, 256, 1, 64)
    mask = masks.causal(256)
    whole = selection_lib.from_mask(mask, 256, 256, block_q=64, block_kv=128)
    attend = lambda where, name: jax.jit(
        lambda *arrays: api.attention(
            *arrays,
            where=where,
            return_lse=True,
            return_col_mass=True,
            implementation=name,
        )
    )(query, key, value)
    with modes.mode_of(implementation):
      sparse = attend(whole, implementation)
    dense = attend(mask, "reference")
    chex.assert_trees_all_close(sparse, dense, atol=1e-4, rtol=1e-5)

  @parameterized.parameters(*_IMPLEMENTATIONS)
  @pytest.mark.by_default(0, 1)
  def test_blocks_that_are_not_listed_are_not_read(self, implementation):
    # Key block 1 is NaN and in no list: it must not reach any result.
    table = jnp.zeros((1, 1, 2, 1), jnp.int32)
    chosen = selection_lib.Selection(
        table, jnp.ones((1, 1, 2), jnp.int32), None, 64, 128
    )
    query, key, value = draws.normal(0, 3, 1, 128, 1, 64)
    key, value = (
        jnp.concatenate([x, jnp.full_like(x, jnp.nan)], axis=1)
        for x in (key, value)
    )
    if implementation == "reference":  # 0 * NaN: it multiplies by weights.
      self.skipTest("the reference reads everything")
    attend = jax.jit(
        lambda *arrays: api.attention(
            *arrays,
            where=chosen,
            return_col_mass=True,
            implementation=implementation,
        )
    )
    with modes.mode_of(implementation):
      got = attend(query, key, value)
    chex.assert_tree_all_finite(got)


@pytest.mark.slow
class KeyHeadsTest(parameterized.TestCase):

  @parameterized.parameters("reference", "xla", "pallas_tpu")
  @pytest.mark.by_default(0, 1)
  def test_a_group_may_share_a_list(self, implementation):
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal((1, 96, n, 16)), jnp.float32)
        for n in (4, 2, 2)
    )
    mask = masks.causal(96)
    by_heads = {}
    for heads in ("kv", "query"):
      col_mass = api.attention(
          query,
          key,
          value,
          where=mask,
          return_col_mass=True,
          col_mass_heads=heads,
          implementation="reference",
      ).col_mass
      by_heads[heads] = col_mass
    choose = lambda col_mass: selection_lib.heavy_hitters(
        col_mass, mask, num_queries=96, num_heavy=1, block_q=32, block_kv=32
    )
    # TPUs want tiles of 128 keys, or one of all.
    wide = implementation == "pallas_tpu"
    shared = choose(by_heads["kv"])
    self.assertEqual(shared.block_table.shape[1], 2)
    if wide:
      shared = dataclasses.replace(
          shared, block_table=0 * shared.block_table[..., :1], block_kv=96
      )
      shared = dataclasses.replace(
          shared, num_valid=jnp.minimum(shared.num_valid, 1).at[0, 1, 2].set(0)
      )
    repeated = selection_lib.by_query_head(shared, 4)
    self.assertEqual(repeated.block_table.shape[1], 4)
    with modes.mode_of(implementation):
      found = api.attention(
          query, key, value, where=shared, implementation=implementation
      ).out
    expected = api.attention(
        query, key, value, where=repeated, implementation="reference"
    ).out
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)

  def test_another_number_of_heads_is_refused(self):
    x = jnp.zeros((1, 96, 6, 16))
    table = np.zeros((1, 2, 3, 1), np.int32)
    where = selection_lib.Selection(table, table[..., 0], None, 32, 32)
    with self.assertRaisesRegex(ValueError, "6 or 3 or 1"):
      api.attention(x, x[:, :, :3], x[:, :, :3], where=where)


class EveryCombinationTest(parameterized.TestCase):

  @parameterized.product(
      implementation=_IMPLEMENTATIONS,
      name=tuple(shapes.SELECTION_TESTS),
      dtype=("float32", "bfloat16"),
      options=(_PLAIN, _ALL),
  )
  @pytest.mark.by_default(0)
  def test_equals_the_oracle(self, implementation, name, dtype, options):
    _run_case(implementation, name, dtype, options)


class DebugTest(parameterized.TestCase):

  def test_entry_out_of_range_under_jit(self):
    arrays = jnp.zeros((3, 1, 64, 2, 16))
    table = jnp.full((1, 2, 4, 2), 4, jnp.int32)
    nums = jnp.ones((1, 2, 4), jnp.int32)
    call = checkify.checkify(
        jax.jit(
            lambda s: api.attention(
                *arrays, where=s, debug=True, implementation="reference"
            ).out
        )
    )
    error, _ = call(selection_lib.Selection(table, nums, None, 16, 16))
    with self.assertRaisesRegex(ValueError, "64 keys have blocks 0 to 3"):
      error.throw()


class CostTest(parameterized.TestCase):

  def test_counts_the_listed_tiles(self):
    # 4 x 4 tiles of 8; causal: 10 of them; a window of 8 keeps 4 + 3.
    shape = shapes.square(32, 2, 1, 4)
    whole = selection_lib.from_mask(
        masks.causal(32), 32, 32, block_q=8, block_kv=8
    )
    near = selection_lib.from_mask(
        masks.sliding_window(32, window=8), 32, 32, block_q=8, block_kv=8
    )
    self.assertEqual(cost.num_pairs(whole, shape), 640)
    self.assertAlmostEqual(cost.density(near, shape, masks.causal(32)), 0.7)
    # Two heads, 640 pairs, 4 H = 16 operations; 2 + 1 + 1 + 2 arrays' bytes.
    forward = cost.forward(shape, 640)
    self.assertEqual(forward.flops, 2 * 640 * 16)
    self.assertEqual(forward.bytes_accessed, 2 * 32 * 4 * 6 + 4 * 2 * 32)
    self.assertEqual(cost.backward(shape, 640).flops, 2 * 640 * 40)


class PlatformTest(parameterized.TestCase):

  @parameterized.parameters(
      (8, 128, "pallas_tpu"),
      (7, 128, "xla"),
      (1, 128, "xla"),
      (8, 1, "xla"),
      (8, 64, "xla"),
  )
  def test_a_tpu_leaves_to_xla_what_it_cannot_tile(self, rows, block, wanted):
    """Unless it is asked for by name, which is an error where it runs."""
    table = np.zeros((1, 1, 512, 2), np.int32)
    where = selection_lib.Selection(table, table[..., 0], None, rows, block)
    query = jax.ShapeDtypeStruct((1, 512, 2, 128), jnp.bfloat16)
    choose = lambda asked: implementations.choose_for(
        asked, api.module_of, query, where
    )
    with mock.patch.object(
        implementations, "current_platform", return_value="tpu"
    ):
      self.assertEqual(choose(None), wanted)
      self.assertEqual(choose("pallas_tpu"), "pallas_tpu")


if __name__ == "__main__":
  absltest.main()
