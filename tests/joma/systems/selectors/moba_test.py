"""MoBA: what a query reads, by hand; its twin that scores by one key."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.systems.selectors import block_cache
from joma.systems.selectors import moba
from joma.transformer import config as configs
from joma.transformer import hooks
from kernels_pallas import masks
from scansnap_jax.experiment import errors

_SIZE, _K = 4, 3


def _draw(length=23, num_heads=4, num_kv_heads=2, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda n: np.float32(rng.normal(size=(2, length, n, 8)))
  return draw(num_heads), draw(num_kv_heads), draw(num_kv_heads)


def _by_hand(query, key, t, mean=lambda block: block.mean(axis=0)):
  """Blocks of query t of one sequence and key head, by a plain loop."""
  own = t // _SIZE
  scores = [
      sum(float(q @ mean(key[c * _SIZE : (c + 1) * _SIZE])) for q in query[t])
      for c in range(own)
  ]
  best = sorted(range(own), key=lambda c: -scores[c])[: _K - 1]
  return {own, *best}


def _call(length):
  return hooks.Call(
      config=configs.TransformerConfig(),
      layer=0,
      x=jnp.zeros((2, length, 1)),
      positions=jnp.zeros((2, length), jnp.int32),
      rotate=lambda x, positions: x,
      options=hooks.AttentionOptions(scale=1.0),
      params={},
      carry={},
      is_training=False,
      has_cache=False,
  )


def _select(query, key, k=_K):
  system = moba.Moba(k=k, block=_SIZE)
  mask = masks.causal(query.shape[1])
  call = _call(query.shape[1])
  select = jax.jit(lambda q, k: system.select({}, call, q, k, mask))
  return select(query, key)


class MobaTest(parameterized.TestCase):

  def test_a_query_reads_its_own_block_and_the_best_by_mean(self):
    query, key, _ = _draw()
    found = _select(query, key)
    self.assertEqual(found.block_table.shape, (2, 2, 23, _K))
    differs = 0
    for b in range(2):
      for t in range(23):
        for head in range(2):  # Of keys, each for two heads of queries.
          group = query[b, :, 2 * head : 2 * head + 2]
          rows = (group, key[b, :, head], t)
          number = int(found.num_valid[b, head, t])
          blocks = np.asarray(found.block_table[b, head, t, :number]).tolist()
          self.assertLen(set(blocks), number)
          self.assertEqual(set(blocks), _by_hand(*rows))
          twin = _by_hand(*rows, mean=lambda block: block[0])
          differs += set(blocks) != twin
    self.assertGreater(differs, 20)  # One key does not stand for its block.

  @parameterized.parameters(0, 3, 4, 17, 22)
  @pytest.mark.slow
  def test_a_step_reads_what_the_pass_reads_by_kept_sums(self, t):
    query, key, _ = _draw()
    found = _select(query, key)
    config = configs.TransformerConfig(
        num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8
    )
    system = moba.Moba(k=_K, block=_SIZE)
    cache = block_cache.init(system, config, 2, 24, jnp.float32)
    self.assertEqual(cache.summary.shape, (2, 2, 6, 8))
    # A prompt padded at its end, and the rest one by one.
    position = jnp.where(jnp.arange(23) <= t, jnp.arange(23), -1)
    call = _call(23)
    sums = system.summarize(
        cache.summary, call, jnp.asarray(key), jnp.stack([position] * 2)
    )
    grouped = jnp.asarray(query[:, t].reshape(2, 2, 2, 8))
    blocks, is_valid = system.choose_by(grouped, sums, jnp.full(2, t), call)
    for b in range(2):
      for head in range(2):
        number = int(found.num_valid[b, head, t])
        wanted = found.block_table[b, head, t, :number]
        self.assertEqual(
            set(np.asarray(blocks[b, head])[np.asarray(is_valid[b, head])]),
            set(np.asarray(wanted)),
        )

  def test_says_what_would_be_right(self):
    with self.assertRaisesRegex(errors.UserError, "k=0 and block=4"):
      moba.Moba(k=0, block=4)


if __name__ == "__main__":
  absltest.main()
