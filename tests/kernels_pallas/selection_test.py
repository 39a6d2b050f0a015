from absl.testing import absltest
from absl.testing import parameterized
import hypothesis
from hypothesis import strategies as st
import jax
from jax.experimental import checkify
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import masks
from kernels_pallas import selection
from kernels_pallas.attention import visits


def _random_mask(rng, num_queries, num_keys):
  """Spans and ids without any structure."""
  edges = np.sort(rng.integers(0, num_keys + 1, (4, num_queries)), axis=0)
  edges = edges.astype(np.int32)
  ids = rng.integers(0, 2, num_queries), rng.integers(0, 2, num_keys)
  ids = tuple(np.sort(i).astype(np.int32) for i in ids)
  use_ids = ids if rng.random() < 0.5 else (None, None)
  return masks.Mask(edges[::2], edges[1::2], *use_ids)


def _dense_states(allowed, block_q, block_kv):
  """Any and all of the allowed pairs of each tile, by plain slicing."""
  num_queries, num_keys = allowed.shape
  tiles = [
      [
          allowed[q : q + block_q, k : k + block_kv]
          for k in range(0, num_keys, block_kv)
      ]
      for q in range(0, num_queries, block_q)
  ]
  some = np.array([[tile.any() for tile in row] for row in tiles])
  every = np.array([[tile.all() for tile in row] for row in tiles])
  return some, every


class TileStatesTest(parameterized.TestCase):

  @hypothesis.given(
      st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 40)
  )
  @hypothesis.settings(max_examples=60, deadline=None)
  def test_never_empty_with_a_pair_nor_full_without_one(self, seed, bq, bk):
    rng = np.random.default_rng(seed)
    num_queries, num_keys = rng.integers(1, 40, 2).tolist()
    mask = _random_mask(rng, num_queries, num_keys)
    states = selection.tile_states(mask, num_queries, num_keys, bq, bk)
    some, every = _dense_states(masks.allowed(mask, num_keys), bq, bk)
    self.assertFalse((some & (states == selection.EMPTY)).any())
    self.assertFalse((~every & (states == selection.FULL)).any())

  @hypothesis.given(
      st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 40)
  )
  @hypothesis.settings(max_examples=8, deadline=None)
  @pytest.mark.slow
  def test_are_the_same_for_a_traced_mask(self, seed, bq, bk):
    rng = np.random.default_rng(seed)
    num_queries, num_keys = rng.integers(1, 40, 2).tolist()
    mask = _random_mask(rng, num_queries, num_keys)
    states = selection.tile_states(mask, num_queries, num_keys, bq, bk)
    traced = jax.jit(selection.tile_states, static_argnums=(1, 2, 3, 4))(
        jax.tree.map(jnp.asarray, mask), num_queries, num_keys, bq, bk
    )
    np.testing.assert_array_equal(states, traced)

  @parameterized.parameters((8, 8), (16, 8), (8, 16))
  def test_is_exact_for_causal_and_window(self, block_q, block_kv):
    for mask in (masks.causal(64), masks.sliding_window(64, window=20)):
      states = selection.tile_states(mask, 64, 64, block_q, block_kv)
      some, every = _dense_states(masks.allowed(mask, 64), block_q, block_kv)
      np.testing.assert_array_equal(states > selection.EMPTY, some)
      np.testing.assert_array_equal(states == selection.FULL, every)

  def test_a_ragged_last_tile_of_keys_is_never_full(self):
    states = selection.tile_states(None, 16, 20, 8, 8)
    np.testing.assert_array_equal(states, [[2, 2, 1]] * 2)

  def test_numbers_of_causal_tiles(self):
    # 8 query tiles see 1 + 2 + ... + 8 = 36 key tiles, the diagonal partly.
    states = selection.tile_states(masks.causal(64), 64, 64, 8, 8)
    self.assertEqual((states == selection.FULL).sum(), 28)
    self.assertEqual((states == selection.PARTIAL).sum(), 8)


class IdsTest(parameterized.TestCase):

  @parameterized.parameters(
      ((0, 0), (0, 0), selection.FULL),
      ((0, 1), (0, 1), selection.PARTIAL),
      ((0, 0), (1, 1), selection.EMPTY),
  )
  def test_a_tile_is_full_where_all_ids_are_one(self, query_ids, key_ids, want):
    mask = masks.hash_sparse(
        np.array(query_ids), np.array(key_ids), is_causal=False
    )
    states = selection.tile_states(mask, 2, 2, 2, 2)
    self.assertEqual(np.ravel(states).tolist(), [want])


class FromMaskTest(parameterized.TestCase):

  def test_lists_the_touched_blocks_in_ascending_order(self):
    chosen = selection.from_mask(
        masks.streaming(32, window=8, num_sinks=4),
        32,
        32,
        block_q=8,
        block_kv=8,
    )
    valid = [
        row[:n].tolist()
        for row, n in zip(
            chosen.block_table[0, 0], chosen.num_valid[0, 0], strict=True
        )
    ]
    self.assertEqual(valid, [[0], [0, 1], [0, 1, 2], [0, 2, 3]])
    self.assertEqual(chosen.block_table.shape[-1], 3)


class HeavyHittersTest(parameterized.TestCase):

  def test_keeps_always_and_the_heaviest_of_the_rest(self):
    # Four key blocks of mass 1, 9, 5, 2; head 1 the reverse.
    mass = jnp.repeat(jnp.array([1.0, 9.0, 5.0, 2.0]), 8) / 8
    col_mass = jnp.stack([mass, mass.reshape(4, 8)[::-1].reshape(-1)])[None]
    chosen = selection.heavy_hitters(
        col_mass,
        masks.causal(32),
        num_queries=32,
        num_heavy=1,
        block_q=8,
        block_kv=8,
    )
    got = [
        [sorted(r[:n].tolist()) for r, n in zip(rows, nums, strict=True)]
        for rows, nums in zip(
            np.asarray(chosen.block_table[0]),
            np.asarray(chosen.num_valid[0]),
            strict=True,
        )
    ]
    # The own block, and the heaviest earlier one (head 1: 2, 5, 9, 1).
    self.assertEqual(got[0], [[0], [0, 1], [1, 2], [1, 3]])
    self.assertEqual(got[1], [[0], [0, 1], [1, 2], [2, 3]])

  def test_never_selects_what_the_mask_forbids(self):
    col_mass = jax.random.uniform(jax.random.key(0), (2, 3, 60))
    mask = masks.causal(60)
    chosen = selection.heavy_hitters(
        col_mass,
        mask,
        num_queries=60,
        num_heavy=3,
        block_q=8,
        block_kv=16,
        always=masks.streaming(60, window=8, num_sinks=1),
    )
    states = visits.states_of(chosen, 60, 60, 8, 16)
    allowed = selection.tile_states(mask, 60, 60, 8, 16)
    self.assertFalse(((np.asarray(states) > 0) & (allowed == 0)).any())
    self.assertTrue((np.asarray(states) > 0).any(axis=-1).all())

  @pytest.mark.slow
  def test_under_jit_and_with_more_blocks_than_there_are(self):
    make = jax.jit(
        lambda c: selection.heavy_hitters(
            c,
            masks.causal(32),
            num_queries=32,
            num_heavy=99,
            block_q=8,
            block_kv=8,
        )
    )
    states = visits.states_of(make(jnp.ones((1, 1, 32))), 32, 32, 8, 8)
    np.testing.assert_array_equal(
        states[0, 0], selection.tile_states(masks.causal(32), 32, 32, 8, 8)
    )


class CheckTest(parameterized.TestCase):

  def _selection(self, entry=0, num_valid=1):
    table = np.full((1, 1, 2, 2), entry, np.int32)
    nums = np.full((1, 1, 2), num_valid, np.int32)
    return selection.Selection(table, nums, None, 8, 8)

  @parameterized.parameters(
      (dict(entry=2), "entries from 2 to 2, but the 16 keys have blocks 0 to"),
      (dict(entry=-1), "entries from -1 to -1"),
      (
          dict(num_valid=3),
          "num_valid is from 3 to 3, but block_table is 2 wide",
      ),
  )
  def test_names_the_entry_and_what_is_right(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      selection.check(self._selection(**fields), 16, 16)

  def test_under_jit_through_checkify(self):
    checked = checkify.checkify(jax.jit(lambda s: selection.check(s, 16, 16)))
    error, _ = checked(self._selection(entry=5))
    with self.assertRaisesRegex(ValueError, "entries from 5 to 5"):
      checkify.check_error(error)
    error, _ = checked(self._selection(entry=1))
    self.assertIsNone(error.get())

  def test_entries_past_num_valid_may_be_anything(self):
    chosen = self._selection()
    chosen.block_table[..., 1] = 77
    selection.check(chosen, 16, 16)


if __name__ == "__main__":
  absltest.main()
