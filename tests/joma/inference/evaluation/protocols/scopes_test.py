import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np

from joma.inference.cache import kv_cache
from joma.inference.evaluation.protocols import scopes
from joma.systems.cache_policies import names
from joma.transformer import config as configs
from scansnap_jax.experiment import errors

_SHAPE = configs.TransformerConfig(
    num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=16
)
_NEXT = jnp.array([6, 4])


def _caches(policy="kvzip"):
  """Two layers of two heads with scores of two texts, of 6 and 4 tokens."""
  score = (
      np.random.default_rng(0).permutation(2 * 2 * 2 * 8).reshape(2, 2, 2, 8)
  )
  pos = np.broadcast_to(np.arange(8), score.shape[1:])
  pos = np.where(pos < np.array(_NEXT)[:, None, None], pos, -1)
  caches = kv_cache.init(names.parse(policy), _SHAPE, 2, 8)
  return score, tuple(
      dataclasses.replace(
          scopes.with_positions(cache, jnp.asarray(pos)),
          score=jnp.asarray(layer, jnp.float32),
      )
      for cache, layer in zip(caches, score, strict=True)
  )


def _wanted(score, sizes, scope, num_sinks=0):
  """Tokens of text b that stay, by a loop over what is sorted."""
  kept = np.zeros(score.shape, bool)
  for b, (size, length) in enumerate(zip(sizes, _NEXT.tolist(), strict=True)):
    groups = [[0, 1]] if scope == "model" else [[0], [1]]
    for layers in groups:
      worth = {
          (layer, head, t): (t < num_sinks, score[layer, b, head, t])
          for layer in layers
          for head in range(2)
          for t in range(length)
      }
      best = sorted(worth, key=worth.get, reverse=True)
      for layer, head, t in best[: size * 2 * len(layers)]:
        kept[layer, b, head, t] = True
  return kept


class TrimTest(parameterized.TestCase):

  @parameterized.product(scope=("layer", "model"), num_sinks=(0, 1))
  def test_the_best_of_all_heads_stay_as_many_as_a_head_has_on_average(
      self, scope, num_sinks
  ):
    score, caches = _caches(f"kvzip:num_sinks={num_sinks}")
    sizes = jnp.array([3, 2])
    found = scopes.trim(caches, sizes, _NEXT, scope=scope)
    kept = np.stack([np.asarray(cache.pos) >= 0 for cache in found])
    wanted = _wanted(score, [3, 2], scope, num_sinks)
    np.testing.assert_array_equal(kept, wanted)
    # 3 and 2 tokens of each of four heads, which are not the same in each.
    self.assertEqual(kept.sum(axis=(0, 2, 3)).tolist(), [12, 8])
    self.assertNotEqual(len({*kept.sum(axis=-1).ravel().tolist()}), 1)
    for cache, before in zip(found, caches, strict=True):
      here = np.asarray(cache.pos) >= 0
      np.testing.assert_array_equal(cache.pos[here], before.pos[here])

  def test_as_many_as_there_are_stay_whole(self):
    _, caches = _caches()
    found = scopes.trim(caches, _NEXT, _NEXT, scope="model")
    for cache, before in zip(found, caches, strict=True):
      np.testing.assert_array_equal(cache.pos, before.pos)

  def test_who_has_no_slots_of_each_head_is_refused(self):
    caches = kv_cache.init(names.parse("full"), _SHAPE, 2, 8)
    with self.assertRaisesRegex(errors.UserError, "ruler.scope=layer has noth"):
      scopes.trim(caches, _NEXT, _NEXT, scope="layer")


if __name__ == "__main__":
  absltest.main()
