"""HiP: what it finds, what it costs, and what it is when it keeps all."""

import functools
import itertools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import kv_cache
from joma.systems.cache_policies.by_attention import h2o
from joma.systems.selectors import hip
from joma.systems.selectors import tree_search
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from tests.joma.systems.selectors import selected
from tests.joma.systems.selectors import taken
from tests.joma.transformer import applied

_TOLERANCE = 1e-6  # The acceptance.


@functools.cache
def _model(entry):
  config = configs.TransformerConfig(
      vocab_size=17,
      num_layers=2,
      embed_dim=16,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      hidden_dim=16,
      attention=(entry,) if entry else (),
  )
  model = models.Transformer(config, implementation="reference")
  tokens = jax.random.randint(jax.random.key(1), (2, 37), 0, 17)
  params = applied.params(model)
  return model, params, tokens


def _steps(model, params, tokens, prompt):
  cache = full_cache.init(model.config, 2, tokens.shape[1])
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  found, cuts = [], [0, *range(prompt, tokens.shape[1] + 1)]
  for start, stop in itertools.pairwise(cuts):
    part = slice(start, stop)
    logits, cache = applied.step(
        model, params, tokens[:, part], positions[:, part], cache
    )
    found.append(logits)
  return jnp.concatenate(found, axis=1)


def _scores(length, num_keys, seed):
  """Normal scores that are alike over about `length` neighbours."""
  rng = np.random.default_rng(seed)
  near = np.exp(-0.5 * (np.arange(-4 * length, 4 * length + 1) / length) ** 2)
  noise = rng.normal(size=num_keys + len(near) - 1)
  found = np.convolve(noise, near if length > 1 else [0, 1, 0], mode="valid")
  return np.float32(found[:num_keys] / found.std())


def _by_hand(scores, num_kept, centre=None, middle=None):
  """The oracle: a search with lists, over all of the scores.

  Args:
    scores: Of each block.
    num_kept: m.
    centre: Which block of [low, high) speaks for it; None is the middle one.
    middle: Where [low, high) is cut; None is after its larger half.
  """
  centre = centre or (lambda low, high: min((low + high) // 2, high - 1))
  middle = middle or (lambda low, high: (low + high + 1) // 2)
  size = len(scores)
  cut = [size * part // num_kept for part in range(num_kept + 1)]
  chunks = list(itertools.pairwise(cut))
  for _ in range(tree_search.num_steps(size, num_kept)):
    halves = []
    for low, high in chunks:
      halves += [(low, middle(low, high)), (middle(low, high), high)]
    halves = [(low, high) for low, high in halves if low < high]
    halves.sort(key=lambda half: -scores[centre(*half)])
    chunks = halves[:num_kept]
  return {low for low, high in chunks if low < high}


def _search(scores, num_kept):
  blocks, is_valid = tree_search.search(
      lambda index: jnp.asarray(scores)[index],
      jnp.zeros((), jnp.int32),
      jnp.full((), len(scores), jnp.int32),
      num_kept,
      tree_search.num_steps(len(scores), num_kept),
  )
  return set(np.asarray(blocks)[np.asarray(is_valid)].tolist())


def _recall(length, search, num_keys=1024, num_kept=32):
  """Share of the best keys that a search finds, over eight draws."""
  shares = []
  for seed in range(8):
    scores = _scores(length, num_keys, seed)
    best = set(np.argsort(-scores)[:num_kept].tolist())
    shares.append(len(search(scores, num_kept) & best) / num_kept)
  return np.mean(shares)


class HipTest(parameterized.TestCase):

  @parameterized.parameters(4, 8)
  @pytest.mark.slow
  def test_with_all_keys_it_is_dense(self, block):
    model, params, tokens = _model(f"hip:k=40:block={block}")
    plain, _, _ = _model("")
    got, want = (
        applied.loss_and_grads(m, params, tokens) for m in (model, plain)
    )
    chex.assert_trees_all_close(got, want, atol=_TOLERANCE)

  @pytest.mark.slow
  def test_with_all_keys_decoding_is_dense(self):
    model, params, tokens = _model("hip:k=40:block=4")
    plain, _, _ = _model("")
    want = applied.logits(plain, params, tokens)
    got = _steps(model, params, tokens, 20)
    chex.assert_trees_all_close(got, want, atol=10 * _TOLERANCE)

  def test_a_step_reads_what_a_search_by_hand_finds(self):
    """One chunk of the eight blocks before, halved three times."""
    rng = np.random.default_rng(0)
    system = hip.Hip(k=4, block=4)
    query = jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32)
    key = jnp.asarray(rng.normal(size=(1, 1, 40, 8)), jnp.float32)
    blocks, is_valid = system.choose_by(
        query, key, jnp.array([39]), selected.call(1)
    )
    score = lambda block: float(key[0, 0, block * 4 + 2] @ query[0, 0, 0])
    low, high = 1, 9
    while high - low > 1:
      middle = (low + high + 1) // 2
      halves = [(low, middle), (middle, high)]
      low, high = max(halves, key=lambda half: score(sum(half) // 2))
    self.assertEqual(np.asarray(blocks)[0, 0].tolist(), [0, 9, low])
    self.assertTrue(bool(is_valid.all()))

  @parameterized.parameters((256, 8), (4096, 128), (64, 64), (2, 1))
  @pytest.mark.by_default(0)
  def test_products_are_counted(self, num_blocks, num_kept):
    counted = []

    def score(index):
      counted.append(index.size)
      return jnp.zeros(index.shape)

    tree_search.search(
        score,
        jnp.zeros((), jnp.int32),
        jnp.full((), num_blocks, jnp.int32),
        num_kept,
        tree_search.num_steps(num_blocks, num_kept),
    )
    want = 2 * num_kept * np.log2(num_blocks / num_kept)
    self.assertEqual(sum(counted), want)

  @parameterized.parameters(*range(1, 23))
  @pytest.mark.by_default(0)
  def test_what_is_listed_is_different_and_not_later(self, num_blocks):
    system = hip.Hip(k=3, block=1, sinks=2, window=2)
    newest = jnp.arange(num_blocks)
    blocks, is_valid = system.find(
        lambda index: jnp.sin(9.0 * index), newest, num_blocks
    )
    for row in range(num_blocks):
      listed = np.asarray(blocks[row])[np.asarray(is_valid[row])]
      self.assertLen(set(listed.tolist()), len(listed))
      self.assertLessEqual(listed.max(), row)
      self.assertContainsSubset(
          {0, min(1, row), row, max(row - 1, 0)}, set(listed.tolist())
      )
      self.assertLen(listed, min(row + 1, 7))

  @parameterized.parameters((64, 8), (50, 7), (23, 5), (9, 9))
  @pytest.mark.by_default(1)
  def test_a_search_is_that_by_hand(self, num_blocks, num_kept):
    scores = _scores(3, num_blocks, 5)
    self.assertEqual(_search(scores, num_kept), _by_hand(scores, num_kept))

  @pytest.mark.slow
  def test_scores_that_are_alike_are_found_and_a_needle_is_not(self):
    """The twin asks the first key of a chunk: it must find less."""
    first = functools.partial(_by_hand, centre=lambda low, high: low)
    self.assertGreater(_recall(16, _search), 0.95)
    self.assertGreater(_recall(4, _search), 0.9)
    self.assertLess(_recall(1, _search), 0.6)
    self.assertLess(_recall(4, first), _recall(4, _search) - 0.1)

  @pytest.mark.slow
  def test_every_block_can_be_found(self):
    """The twin ends second halves one block early: the last ones are lost."""
    needles = [-np.abs(np.arange(16.0) - best) for best in range(16)]
    found = set().union(*(_search(scores, 2) for scores in needles))
    self.assertEqual(found, set(range(16)))
    twin = lambda scores: _by_hand(scores[:-1], 2)
    self.assertNotEqual(set().union(*map(twin, needles)), set(range(16)))

  @pytest.mark.slow
  def test_later_tokens_and_other_rows_do_not_matter(self):
    model, params, tokens = _model("hip:k=4:block=4")
    # A whole block of queries searches together: change what comes after it.
    changed = tokens.at[0, 20:].set((tokens[0, 20:] + 1) % 17)
    one, two = (applied.logits(model, params, t) for t in (tokens, changed))
    chex.assert_trees_all_equal(one[1], two[1])
    chex.assert_trees_all_close(one[0, :20], two[0, :20], atol=_TOLERANCE)

  @pytest.mark.slow
  def test_the_compiled_step_takes_as_many_keys_from_its_cache_at_every_length(
      self,
  ):
    """After fusion: nothing but gathers and slices has the cache as operand.

    What they take out, for scores and for attention, is counted in the text of
    the compiled program; the new key is scattered in place. The twin is dense
    attention, whose products have all of the cache as operand.
    """
    small, large = (taken.taken("hip:k=512", n) for n in (4096, 65_536))
    for found in (small, large):
      self.assertEqual(found.others, {"scatter"})
    # A key and a value of m + 2 blocks of 128 in each of 2 x 2 heads, and in
    # each step of the search 2 m keys; log2(C / 512) steps.
    blocks = 2 * 2 * (4 + 2) * 128
    for found, num_steps in ((small, 3), (large, 7)):
      searched = 2 * 2 * 2 * 4 * num_steps
      self.assertEqual(found.elements, 8 * (2 * blocks + searched))
    self.assertLess(large.elements, 1.1 * small.elements)
    # No array beside the caches, such as scores of all keys, grows with them.
    self.assertEqual(small.largest, large.largest)
    self.assertIn("dot", taken.taken("", 4096).others)

  @pytest.mark.slow
  def test_of_a_block_every_so_many_th_query_is_asked(self):
    query, key, _ = selected.draw(32)

    def chosen(query, stride):
      system = hip.Hip(k=4, block=4, stride=stride)
      return selected.select(system, query, key).block_table

    # The queries at 2, 6, ... alone: what others would like changes nothing.
    loud = (10 * query).at[:, 2::4].set(query[:, 2::4])
    np.testing.assert_array_equal(chosen(loud, 4), chosen(query, 4))
    self.assertTrue((chosen(loud, 1) != chosen(query, 1)).any())
    with self.assertRaisesRegex(errors.UserError, "stride=3 must divide"):
      hip.Hip(stride=3)

  @pytest.mark.slow
  def test_what_does_not_fit_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "multiple of block=128"):
      hip.Hip(k=500)
    model, _, _ = _model("hip:k=8:block=4")
    with self.assertRaisesRegex(errors.UserError, "nothing to evict"):
      kv_cache.init(h2o.H2O(), model.config, 2, 32)

  @pytest.mark.slow
  def test_with_sinks_of_its_own(self):
    model, params, tokens = _model("hip:k=40:block=4+sink_logits:start=1")
    plain, _, _ = _model("sink_logits:start=1")
    want = applied.logits(plain, params, tokens)
    got = applied.logits(model, params, tokens)
    chex.assert_trees_all_close(got, want, atol=2 * _TOLERANCE)
    got = _steps(model, params, tokens, 20)
    chex.assert_trees_all_close(got, want, atol=10 * _TOLERANCE)


if __name__ == "__main__":
  absltest.main()
