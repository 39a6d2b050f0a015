import functools
import itertools

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import model as models
from tests.joma.transformer import applied

# Ten times the largest float32 error seen, logits being of order 1.
_TOLERANCE = 2e-5
_CONFIG = configs.TransformerConfig(
    vocab_size=50,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=24,
    windows=(0, 5),
    attn_logits_soft_cap=2.0,
)
_MODEL = models.Transformer(_CONFIG, implementation="reference")
_TOKENS = jax.random.randint(jax.random.key(0), (3, 12), 0, 50)


@functools.cache
def _params():
  with jax.ensure_compile_time_eval():  # Whoever asks first may be traced.
    return applied.params(_MODEL, 1)


@jax.jit
def _apply(tokens, positions, kv_cache):
  return _MODEL.apply(
      {"params": _params()}, tokens, positions=positions, kv_cache=kv_cache
  )


@functools.cache
def _want():
  return jax.jit(_MODEL.apply)({"params": _params()}, _TOKENS)


def _positions(start, stop):
  return jnp.broadcast_to(jnp.arange(start, stop)[None], (3, stop - start))


class FullCacheTest(parameterized.TestCase):

  @parameterized.parameters(
      ((0, 12),), ((0, 6, 12),), ((0, 6, *range(7, 13)),), ((0, 1, 7, 12),)
  )
  @pytest.mark.by_default(1)
  def test_pieces_of_any_length_give_what_the_whole_gives(self, cuts):
    kv_cache, pieces = full_cache.init(_CONFIG, 3, 16), []
    for start, stop in itertools.pairwise(cuts):
      logits, kv_cache = _apply(
          _TOKENS[:, start:stop], _positions(start, stop), kv_cache
      )
      pieces.append(logits)
    got = jnp.concatenate(pieces, axis=1)
    chex.assert_trees_all_close(got, _want(), atol=_TOLERANCE)

  @pytest.mark.slow
  def test_padding_is_neither_kept_nor_seen(self):
    lengths = jnp.array([6, 2, 4])
    steps = _positions(0, 6)
    positions = jnp.where(steps < lengths[:, None], steps, -1)
    kv_cache = full_cache.init(_CONFIG, 3, 16)
    _, kv_cache = _apply(_TOKENS[:, :6], positions, kv_cache)
    np.testing.assert_array_equal(kv_cache[0].key[1, :, 2:], 0)
    for step in range(3):
      at = lengths + step
      tokens = jnp.take_along_axis(_TOKENS, at[:, None], axis=1)
      logits, kv_cache = _apply(tokens, at[:, None], kv_cache)
      want = jnp.take_along_axis(_want(), at[:, None, None], axis=1)
      chex.assert_trees_all_close(logits, want, atol=_TOLERANCE)

  def test_what_lies_behind_a_query_does_not_matter(self):
    dirty = jax.tree.map(lambda x: x + 7.0, full_cache.init(_CONFIG, 3, 16))
    logits, _ = _apply(_TOKENS, _positions(0, 12), dirty)
    chex.assert_trees_all_close(logits, _want(), atol=_TOLERANCE)

  @pytest.mark.slow
  def test_decoding_writes_the_donated_cache_in_place(self):
    step = jax.jit(
        lambda params, tokens, positions, kv_cache: _MODEL.apply(
            {"params": params}, tokens, positions=positions, kv_cache=kv_cache
        ),
        donate_argnums=3,
    )
    kv_cache = full_cache.init(_CONFIG, 3, 4096)
    compiled = step.lower(
        _params(), _TOKENS[:, :1], _positions(0, 1), kv_cache
    ).compile()
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(kv_cache))
    analysis = compiled.memory_analysis()
    self.assertGreaterEqual(analysis.alias_size_in_bytes, cache_bytes)
    # Temporaries are rows of logits, far less than one layer's keys.
    layer_bytes = kv_cache[0].key.nbytes
    self.assertLess(analysis.temp_size_in_bytes, layer_bytes)
