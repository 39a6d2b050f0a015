"""Tokens taken on trial: what is taken back has never come."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import kv_cache
from joma.inference.cache import trial
from joma.systems.cache_policies import names
from scansnap_jax.experiment import errors
from tests.laws import policies_test
from tests.laws import policy_laws as laws

# Tokens on trial, more than there are slots, and how many of each text stay.
_TRIED, _COUNTS = 12, (5, 12, 0)
_OWN = ("quest", "kivi", "think", "adakv")
_NAMES = [name for name in names.POLICIES if name not in _OWN]


def _plain(x, positions):
  return x


@jax.jit
def _tried(cache, arrays, counts):
  """Prompts, then tokens on trial of which the first stay."""
  steps = jnp.arange(max(laws.LENGTHS))[None]
  lengths = jnp.array(laws.LENGTHS)
  positions = jnp.where(steps < lengths[:, None], steps, -1)
  first = [x[:, : steps.shape[1]] for x in arrays]
  _, cache = cache.attend(*first, positions, _plain, laws._OPTIONS)
  places = lengths[:, None] + jnp.arange(_TRIED)[None]
  pick = lambda x: jnp.take_along_axis(x, places[..., None, None], axis=1)
  (on_trial,) = trial.begin((cache,))
  out, on_trial = on_trial.attend(
      *map(pick, arrays), places, _plain, laws._OPTIONS
  )
  return out, trial.keep((on_trial,), counts)[0]


class TrialTest(parameterized.TestCase):

  @parameterized.parameters("h2o", *(n for n in _NAMES if n != "h2o"))
  @pytest.mark.by_default(1)
  def test_what_is_taken_back_has_never_come(self, name):
    """The cache is that of steps without those tokens, bit for bit."""
    policy = names.parse(policies_test._SIZED.get(name, name))
    self._check(policy, laws.init(policy, laws.FEW))

  @parameterized.parameters(
      {"dtype": jnp.int8},
      {"page_size": 4},
      {"keys": "raw", "positions": "rolled"},
  )
  @pytest.mark.slow
  def test_with_every_option_of_a_cache(self, **options):
    policy = names.parse("h2o:num_recent=2")
    make = functools.partial(
        kv_cache.init, policy, laws.CONFIG, len(laws.LENGTHS), laws.FEW
    )
    self._check(policy, make(**options)[0])

  def _check(self, policy, cache):
    arrays = laws.draw()
    out, kept = _tried(cache, arrays, jnp.array(_COUNTS))
    is_active = np.arange(laws.STEPS)[:, None] < np.array([_COUNTS])
    want = laws.run(cache, arrays, is_active=is_active)
    if isinstance(policy, laws._ROUNDS):
      laws._assert_same_cache(kept, want.cache)
    else:
      chex.assert_trees_all_equal(kept, want.cache)
    for row, count in enumerate(_COUNTS):
      np.testing.assert_allclose(
          out[row, :count], want.steps[:count, row, 0], atol=1e-6
      )

  def test_a_cache_that_gives_nothing_back_is_named(self):
    for name in _OWN:
      caches = kv_cache.init(
          names.parse(policies_test._SIZED.get(name, name)), laws.CONFIG, 1, 32
      )
      with self.assertRaisesRegex(
          errors.UserError, f"layer 0, {name}, cannot give tokens back"
      ):
        trial.check(caches)


if __name__ == "__main__":
  absltest.main()
