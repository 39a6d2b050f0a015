from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks

# Two packed sequences of 24 tokens: documents, and pieces of shared questions.
_DOCUMENTS = np.array([
    [0] * 5 + [1] * 1 + [2] * 11 + [3] * 7,
    [0] * 24,
])
_PIECES = np.array([
    [0] * 4 + [1] * 3 + [2] * 5 + [3] * 6 + [4] * 2 + [5] * 4,
    [0] * 8 + [1] * 8 + [2] * 8,
])
_QUESTIONS = np.array([[0] * 12 + [1] * 12, [0] * 24])
_BUCKETS = np.random.default_rng(0).integers(0, 3, (2, 2, 24))
_KEEP = np.random.default_rng(1).random((2, 2, 24)) < 0.6


def _same(b, t, s):
  return _DOCUMENTS[b, t] == _DOCUMENTS[b, s]


def _place(b, t):
  """Position of a token in its document."""
  return t - int(np.argmax(_DOCUMENTS[b] == _DOCUMENTS[b, t]))


def _is_question(b, s):
  """Whether s is in the first piece of its question's group."""
  first = int(np.argmax(_QUESTIONS[b] == _QUESTIONS[b, s]))
  return _PIECES[b, s] == _PIECES[b, first]


def _shares(b, t, s):
  same_piece = _PIECES[b, t] == _PIECES[b, s]
  asked = _QUESTIONS[b, t] == _QUESTIONS[b, s] and _is_question(b, s)
  return s <= t and (same_piece or asked)


# Family -> (mask, predicate of batch, query, key): the definition in words.
_FAMILIES = {
    "full": (masks.full(24, 24), lambda b, t, s: True),
    "causal": (masks.causal(24), lambda b, t, s: s <= t),
    "document_full": (
        masks.document(_DOCUMENTS, is_causal=False),
        _same,
    ),
    "document_causal": (
        masks.document(_DOCUMENTS),
        lambda b, t, s: _same(b, t, s) and s <= t,
    ),
    "block_causal_document": (
        masks.block_causal_document(_DOCUMENTS, block_size=3),
        lambda b, t, s: _same(b, t, s)
        and _place(b, s) // 3 <= _place(b, t) // 3,
    ),
    "causal_blockwise": (
        masks.causal_blockwise(_DOCUMENTS),
        lambda b, t, s: s <= t
        and (_same(b, t, s) or _DOCUMENTS[b, t] == _DOCUMENTS[b, -1]),
    ),
    "share_question": (masks.share_question(_PIECES, _QUESTIONS), _shares),
    "prefix_lm": (
        masks.prefix_lm(24, prefix_len=6),
        lambda b, t, s: s <= t or s < 6,
    ),
    "prefix_lm_document": (
        masks.prefix_lm_document(_DOCUMENTS, prefix_len=3),
        lambda b, t, s: _same(b, t, s) and (s <= t or _place(b, s) < 3),
    ),
    "window_full": (
        masks.sliding_window(24, window=4, is_causal=False),
        lambda b, t, s: abs(s - t) <= 4,
    ),
    "window_causal": (
        masks.sliding_window(24, window=4),
        lambda b, t, s: 0 <= t - s < 4,
    ),
    "global_window": (
        masks.global_window(24, window=3, num_global=2),
        lambda b, t, s: abs(s - t) <= 3 or s < 2 or t < 2,
    ),
    "global_window_causal": (
        masks.global_window(24, window=3, num_global=2, is_causal=True),
        lambda b, t, s: s <= t and (t - s < 3 or s < 2),
    ),
    "streaming": (
        masks.streaming(24, window=5, num_sinks=3),
        lambda b, t, s: s <= t and (t - s < 5 or s < 3),
    ),
    "query_key_sparse": (
        masks.query_key_sparse(_KEEP[0], _KEEP[1]),
        lambda b, t, s: s <= t and _KEEP[0, b, t] and _KEEP[1, b, s],
    ),
    "hash_sparse": (
        masks.hash_sparse(_BUCKETS[0], _BUCKETS[1]),
        lambda b, t, s: s <= t and _BUCKETS[0, b, t] == _BUCKETS[1, b, s],
    ),
    "key_lengths": (
        masks.key_lengths(24, np.array([7, 24])),
        lambda b, t, s: s < (7, 24)[b],
    ),
    "cross_causal": (
        masks.causal(24, 30, offset=6),
        lambda b, t, s: s <= t + 6,
    ),
    "cross_window": (
        masks.sliding_window(24, 20, window=4, offset=-3),
        lambda b, t, s: 0 <= t - 3 - s < 4,
    ),
}


class FamiliesTest(parameterized.TestCase):

  @parameterized.parameters(*_FAMILIES)
  def test_equals_its_predicate(self, family):
    mask, predicate = _FAMILIES[family]
    num_keys = {"cross_causal": 30, "cross_window": 20}.get(family, 24)
    got = np.broadcast_to(masks.allowed(mask, num_keys), (2, 24, num_keys))
    expected = [
        [[predicate(b, t, s) for s in range(num_keys)] for t in range(24)]
        for b in range(2)
    ]
    np.testing.assert_array_equal(got, expected)

  @parameterized.parameters(*_FAMILIES)
  def test_spans_are_disjoint_and_in_order(self, family):
    mask, _ = _FAMILIES[family]
    chex.assert_type([mask.starts, mask.stops], np.int32)
    if mask.starts.shape[-2] == 2:
      is_real = mask.starts[..., 1, :] < mask.stops[..., 1, :]
      in_order = mask.stops[..., 0, :] <= mask.starts[..., 1, :]
      self.assertTrue((in_order | ~is_real).all())

  @parameterized.named_parameters(
      ("document", masks.document, (_DOCUMENTS,), {}),
      ("full", masks.document, (_DOCUMENTS,), {"is_causal": False}),
      ("block", masks.block_causal_document, (_DOCUMENTS,), {"block_size": 3}),
      ("blockwise", masks.causal_blockwise, (_DOCUMENTS,), {}),
      ("question", masks.share_question, (_PIECES, _QUESTIONS), {}),
      ("prefix", masks.prefix_lm_document, (_DOCUMENTS,), {"prefix_len": 3}),
      ("sparse", masks.query_key_sparse, tuple(_KEEP), {}),
      ("hash", masks.hash_sparse, tuple(_BUCKETS), {}),
  )
  def test_is_the_same_of_traced_ids(self, make, arrays, options):
    known = make(*arrays, **options)
    traced = jax.jit(lambda *a: make(*a, **options))(*map(jnp.asarray, arrays))
    self.assertIsInstance(known.starts, np.ndarray)
    np.testing.assert_array_equal(
        masks.allowed(known, 24), masks.allowed(traced, 24)
    )


class SinksTest(absltest.TestCase):

  def test_there_are_no_more_sinks_than_keys(self):
    mask = masks.sinks(3, 4, num_sinks=9)
    np.testing.assert_array_equal(mask.stops, [[4, 4, 4]])


class DocumentTest(parameterized.TestCase):

  def test_negative_ids_are_padding(self):
    allowed = masks.allowed(masks.document(np.array([-1, 0, 0, -1])), 4)
    expected = [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(allowed, expected)

  def test_an_id_that_returns_is_another_document(self):
    allowed = masks.allowed(masks.document(np.array([0, 1, 0])), 3)
    np.testing.assert_array_equal(allowed, np.eye(3))


class CombinationTest(parameterized.TestCase):

  def test_and_keeps_what_both_allow(self):
    window = masks.sliding_window(24, window=9)
    both = masks.document(_DOCUMENTS) & window
    np.testing.assert_array_equal(
        masks.allowed(both, 24),
        masks.allowed(masks.document(_DOCUMENTS), 24)
        & masks.allowed(window, 24),
    )

  @parameterized.parameters(2, 7, 30)
  def test_or_joins_spans_that_touch_or_overlap(self, window):
    sinks = masks.sinks(24, 24, num_sinks=5)
    near = masks.sliding_window(24, window=window)
    either = masks.allowed(sinks | near, 24)
    np.testing.assert_array_equal(
        either, masks.allowed(sinks, 24) | masks.allowed(near, 24)
    )

  def test_refuses_what_two_spans_cannot_say(self):
    two = masks.streaming(24, window=3, num_sinks=1)
    ids = masks.hash_sparse(_BUCKETS[0, 0], _BUCKETS[1, 0])
    with self.assertRaisesRegex(ValueError, "two spans each"):
      _ = two & two
    with self.assertRaisesRegex(ValueError, "ids each"):
      _ = ids & ids
    with self.assertRaisesRegex(ValueError, "one span each"):
      _ = two | masks.causal(24)

  def test_a_window_of_nothing_is_refused(self):
    with self.assertRaisesRegex(ValueError, "window=0 must be at least 1"):
      masks.sliding_window(24, window=0)
    with self.assertRaisesRegex(ValueError, "block_size=0"):
      masks.block_causal_document(_DOCUMENTS, block_size=0)

  def test_is_a_pytree_of_abstract_arrays_too(self):
    mask = masks.hash_sparse(_BUCKETS[0], _BUCKETS[1])
    shapes = jax.eval_shape(lambda m: m, mask)
    self.assertEqual(shapes.starts.shape, (1, 24))


if __name__ == "__main__":
  absltest.main()
