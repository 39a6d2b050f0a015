"""Policies on arrays alone keep what the project's own cache keeps."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference import compression
from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.systems.cache_policies import names
from scansnap_jax.experiment import errors
from tests.laws import policy_laws

_LENGTHS, _SCALE = jnp.array(policy_laws.LENGTHS), 0.4
# Eight slots have no room for compactor's own sinks and last tokens.
_FEW = {"compactor": "compactor:num_sinks=2:num_recent=2"}
_OF_SLOTS = tuple(
    _FEW.get(name, name)
    for name in (*names.POLICIES, "criticalkv:h2o", "criticalkv:snapkv")
    if not calls.has_own_cache(names.parse(name)) and name != "full"
)


def _arrays():
  return [x[:, : max(policy_laws.LENGTHS)] for x in policy_laws.draw()]


def _own(policy):
  """The slots of this project's cache after the same prompts."""
  few = policy_laws.FEW
  (cache,) = kv_cache.init(
      calls.fitted(policy, few), policy_laws.CONFIG, len(_LENGTHS), few
  )
  query, key, value = _arrays()
  steps = jnp.arange(key.shape[1])[None]
  positions = jnp.where(steps < _LENGTHS[:, None], steps, -1)
  _, cache = cache.attend(
      query, key, value, positions, policy_laws._plain, policy_laws._OPTIONS
  )
  return cache


def _compress(policy, **statistics):
  query, key, value = _arrays()
  make = functools.partial(
      compression.compress,
      policy=policy,
      capacity=policy_laws.FEW,
      scale=_SCALE,
  )
  given = {"query": query} if not statistics else statistics
  return jax.jit(make)(key, value, compression.Statistics(**given), _LENGTHS)


class CompressTest(parameterized.TestCase):

  @parameterized.parameters(*_OF_SLOTS)
  @pytest.mark.by_default(_OF_SLOTS.index("h2o"))
  def test_keeps_the_slots_of_the_own_cache(self, name):
    cache, kept = _own(names.parse(name)), _compress(name)
    # Of a layer that frees slots the empty ones may stand between others.
    order = np.argsort(np.where(cache.pos < 0, 99, cache.pos), stable=True)
    pick = lambda x: np.take_along_axis(
        np.asarray(x), order.reshape(order.shape + (1,) * (x.ndim - 3)), axis=2
    )
    slots_first = lambda x: pick(x).swapaxes(1, 2)
    np.testing.assert_array_equal(kept.positions, slots_first(cache.pos))
    is_kept = kept.positions[..., None] >= 0
    for mine, theirs in ((kept.keys, cache.key), (kept.values, cache.value)):
      chex.assert_trees_all_equal(
          jnp.where(is_kept, mine, 0),
          jnp.where(is_kept, slots_first(theirs.data), 0),
      )
    count = (cache.pos >= 0).sum(axis=-1).max(axis=-1)
    np.testing.assert_array_equal(kept.lengths, count)

  @parameterized.parameters(*_OF_SLOTS)
  def test_who_reads_queries_says_so(self, name):
    query, key, value = _arrays()
    keep = lambda query: compression.compress(
        key,
        value,
        compression.Statistics(query=query, col_mass=jnp.ones((3, 4, 11))),
        _LENGTHS,
        policy=name,
        capacity=8,
    )
    program = jax.make_jaxpr(keep)(query).jaxpr
    (given,) = program.invars
    is_read = any(given in equation.invars for equation in program.eqns)
    self.assertEqual(is_read, compression.required(name) == ("query",))

  @parameterized.parameters(*_OF_SLOTS)
  @pytest.mark.slow
  def test_what_a_policy_does_not_require_it_does_not_read(self, name):
    query, key, value = _arrays()
    required = compression.required(name)
    whole = _compress(name)
    if required == ("query",):
      with self.assertRaisesRegex(errors.UserError, "Statistics.query="):
        _compress(name, col_mass=jnp.ones((3, 4, key.shape[1])))
      return
    if required == ("col_mass",):
      logits = np.einsum(
          "btngh,bsnh->bngts", query.reshape(3, -1, 2, 2, 8), key
      )
      is_seen = np.tri(key.shape[1], dtype=bool)
      weights = np.asarray(
          jax.nn.softmax(np.where(is_seen, _SCALE * logits, -np.inf))
      )
      is_row = np.arange(key.shape[1]) < np.asarray(_LENGTHS)[:, None]
      mass = (weights * is_row[:, None, None, :, None]).sum(axis=3)
      given = {"col_mass": jnp.asarray(mass.reshape(3, 4, -1), jnp.float32)}
    else:
      given = {"query": jnp.full_like(query, jnp.nan)}
    np.testing.assert_array_equal(
        _compress(name, **given).positions, whole.positions
    )

  @pytest.mark.slow
  def test_what_stands_behind_a_sequence_does_not_vote(self):
    query, key, value = (x[1:2] for x in _arrays())
    keep = lambda query: compression.compress(
        key[:, : query.shape[1]],
        value[:, : query.shape[1]],
        compression.Statistics(query=query),
        jnp.array([6]),
        policy="h2o",
        capacity=4,
    ).positions[0]
    alone = keep(query[:, :6])
    # All behind would have a key stay that does not.
    gone = next(t for t in range(6) if t not in alone[:, 0])
    behind = 9 * jnp.repeat(key[:, gone : gone + 1], 2, axis=2)
    behind = jnp.broadcast_to(behind, query[:, 6:].shape)
    query = jnp.concatenate([query[:, :6], behind], axis=1)
    np.testing.assert_array_equal(keep(query), alone)

  def test_keys_alone_by_hand(self):
    """Knorm keeps short keys, and the newest, which are protected."""
    norms = np.array([3.0, 1.0, 4.0, 2.0, 9.0], np.float32)
    key = jnp.asarray(norms)[None, :, None, None] * jnp.ones((1, 5, 1, 4))
    kept = compression.compress(
        key, -key, None, jnp.array([5]), policy="knorm:num_recent=1", capacity=3
    )
    np.testing.assert_array_equal(kept.positions[0, :, 0], [1, 3, 4])
    np.testing.assert_array_equal(kept.keys[0, :, 0, 0], [1, 2, 9])
    np.testing.assert_array_equal(kept.values[0, :, 0, 0], [-1, -2, -9])

  @parameterized.parameters(
      ("h2o", 2, "policy h2o looks at more than keys and values"),
      ("quest", 2, "policy quest keeps tokens in a cache of its own kind"),
      ("full", 2, "policy full evicts nothing: capacity=2 must be at least"),
      ("knorm", 0, "capacity must be at least 1, got 0"),
  )
  def test_refuses_in_a_sentence(self, name, capacity, words):
    _, key, value = _arrays()
    with self.assertRaisesRegex(errors.UserError, words):
      compression.compress(
          key, value, None, _LENGTHS, policy=name, capacity=capacity
      )


if __name__ == "__main__":
  absltest.main()
