"""Pages hold what slots hold, in the memory that this takes."""

import functools

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import kv_cache
from joma.systems.cache_policies import names
from joma.systems.cache_policies.by_attention import h2o
from joma.systems.cache_policies.wrapping import dms
from joma.systems.cache_policies.wrapping import dms_pages
from scansnap_jax.experiment import errors
from tests.laws import policy_laws

_LENGTHS = np.array(policy_laws.LENGTHS)
_PLAIN = lambda x, positions: x


def _policy(threshold):
  base = h2o.H2O(num_recent=2, num_sinks=1)
  return dms.DMS(base=base, threshold=threshold)


@functools.partial(jax.jit, static_argnames="length")
def _attend(cache, arrays, at, length=1):
  """The next tokens of each text; prompts are ragged."""
  steps = at[:, None] + jnp.arange(length)[None]
  pick = lambda x: jnp.take_along_axis(x, steps[..., None, None], axis=1)
  if length > 1:
    steps = jnp.where(steps < _LENGTHS[:, None], steps, -1)
  one = [pick(x) for x in arrays]
  return cache.attend(*one, steps, _PLAIN, policy_laws._OPTIONS)


def _after_prompts(policy):
  """A cache of 32 slots a head after prompts of 5, 11 and 1 tokens."""
  cache = policy_laws.init(policy, policy_laws.ALL)
  zeros = jnp.zeros(3, jnp.int32)
  return _attend(cache, policy_laws.draw(), zeros, length=int(max(_LENGTHS)))[1]


def _kept(cache):
  """Positions by text and head, in order."""
  pos = np.asarray(cache.kept_positions())
  return [
      [sorted(p for p in head if p >= 0) for head in text]
      for text in pos.tolist()
  ]


def _bytes(cache):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


class PagesTest(absltest.TestCase):

  def test_a_prompt_is_laid_out_in_as_many_pages_as_it_needs(self):
    cache = _after_prompts(_policy(0.9))
    (paged,) = dms_pages.in_pages([cache], num_free=1, page_size=4)
    self.assertEqual(_kept(paged), _kept(cache))
    size = paged.page_size
    pages = [
        [-(-(len(head) + 1) // size) for head in text] for text in _kept(cache)
    ]
    np.testing.assert_array_equal(paged.budgets, size * np.array(pages))
    most = max(map(sum, pages))
    self.assertEqual(paged.pool.key.data.shape, (3, 1, most * size, 8))
    self.assertLess(_bytes(paged), _bytes(cache) * 0.6)

  @pytest.mark.slow
  def test_steps_keep_what_slots_keep_and_pages_are_given_back(self):
    for threshold in (0.7, 1.2):
      slots, arrays = _after_prompts(_policy(threshold)), policy_laws.draw()
      (paged,) = dms_pages.in_pages([slots], num_free=10, page_size=4)
      for step in range(policy_laws.STEPS):
        at = jnp.asarray(_LENGTHS + step)
        if step and step % 10 == 0:
          before = _kept(paged)
          (paged,) = dms_pages.in_pages([paged], num_free=10)
          self.assertEqual(_kept(paged), before)
        want, slots = _attend(slots, arrays, at)
        got, paged = _attend(paged, arrays, at)
        np.testing.assert_allclose(got, want, atol=1e-6)
        self.assertEqual(_kept(paged), _kept(slots), (threshold, step))
      seen = 2 * int((_LENGTHS + policy_laws.STEPS).sum())
      kept = sum(len(head) for text in _kept(slots) for head in text)
      self.assertLess(kept, 0.8 * seen)
      (paged,) = dms_pages.in_pages([paged], num_free=1)
      self.assertLess(_bytes(paged), 0.8 * _bytes(slots))

  def test_what_is_no_slot_is_refused(self):
    adakv = names.parse("adakv:h2o").with_capacity(16)
    (pooled,) = kv_cache.init(adakv, policy_laws.CONFIG, 1, 16)
    with self.assertRaisesRegex(errors.UserError, "shared out already"):
      dms_pages.in_pages([pooled], num_free=1)
    (raw,) = kv_cache.init(_policy(0.5), policy_laws.CONFIG, 1, 16, keys="raw")
    with self.assertRaisesRegex(errors.UserError, "takes rotated keys"):
      dms_pages.in_pages([raw], num_free=1)
    with self.assertRaisesRegex(errors.UserError, "num_free"):
      dms_pages.in_pages([], num_free=0)


if __name__ == "__main__":
  absltest.main()
