from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import masks
from kernels_pallas import spans

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


# Padding before, between and after the tokens; of one sequence nothing else.
_PADDED = np.array([
    [-1, -1, 0, 0, 0, -1, 1, 1, -1, -1, 2, 2, 2, -1],
    [3, 3, -1, 4, 4, 4, 4, -1, -1, 5, 5, -1, -1, -1],
    [-1] * 14,
])
_PADDED_GROUPS = np.array([[0] * 9 + [1] * 5, [0] * 14, [0] * 14])

_PADDED_FAMILIES = {
    "document": masks.document,
    "full": lambda ids: masks.document(ids, is_causal=False),
    "block": lambda ids: masks.block_causal_document(ids, block_size=2),
    "blockwise": masks.causal_blockwise,
    "question": lambda ids: masks.share_question(ids, _PADDED_GROUPS),
    "no_question": lambda ids: masks.share_question(
        np.maximum(_PADDED, 0), ids
    ),
    "prefix": lambda ids: masks.prefix_lm_document(ids, prefix_len=2),
    "hash": lambda ids: masks.hash_sparse(ids, ids, is_causal=False),
}


class PaddingTest(parameterized.TestCase):

  @parameterized.parameters(*_PADDED_FAMILIES)
  @pytest.mark.by_default(0, 1)
  def test_a_negative_id_sees_nothing_and_is_seen_by_nothing(self, family):
    make = _PADDED_FAMILIES[family]
    got = masks.allowed(make(_PADDED), 14)
    is_token = _PADDED >= 0
    both = is_token[:, :, None] & is_token[:, None, :]
    self.assertFalse((got & ~both).any())
    # Every token sees at least itself: padding has not emptied the mask.
    self.assertTrue((got.diagonal(axis1=1, axis2=2) == is_token).all())
    traced = masks.allowed(jax.jit(make)(jnp.asarray(_PADDED)), 14)
    np.testing.assert_array_equal(got, traced)

  def test_the_last_block_before_the_padding_is_asked(self):
    got = masks.allowed(masks.causal_blockwise(_PADDED), 14)
    for b, last in ((0, 12), (1, 10)):
      expected = (_PADDED[b] >= 0) & (np.arange(14) <= last)
      np.testing.assert_array_equal(got[b, last], expected)

  def test_padding_at_the_ends_costs_no_ids(self):
    mask = masks.causal_blockwise(np.array([-1, 0, 0, 1, 1, -1]))
    self.assertIsNone(mask.query_ids)

  def test_a_question_stands_after_the_padding_of_its_group(self):
    got = masks.allowed(masks.share_question(_PADDED, _PADDED_GROUPS), 14)
    # Group 0 of sequence 0 asks [2, 5), of sequence 1 [0, 2).
    np.testing.assert_array_equal(np.flatnonzero(got[0, 7]), [2, 3, 4, 6, 7])
    np.testing.assert_array_equal(np.flatnonzero(got[0, 12]), [10, 11, 12])
    np.testing.assert_array_equal(np.flatnonzero(got[1, 10]), [0, 1, 9, 10])


_NUMBERS = {
    "causal": (lambda n: masks.causal(9, 13, offset=n), (-2, 0, 4, 99)),
    "offset": (
        lambda n: masks.sliding_window(9, 13, window=3, offset=n),
        (-2, 0, 4, 99),
    ),
    "window": (
        lambda n: masks.sliding_window(9, 13, window=n, offset=2),
        (1, 4, 2**31 - 1),
    ),
    "both_sides": (
        lambda n: masks.sliding_window(9, 13, window=n, is_causal=False),
        (1, 4, 2**31 - 1),
    ),
    "sinks": (lambda n: masks.sinks(9, 13, num_sinks=n), (0, 4, 99)),
    "streaming": (
        lambda n: masks.streaming(9, 13, window=n + 1, num_sinks=n, offset=n),
        (0, 2, 5),
    ),
    "global_window": (
        lambda n: masks.global_window(13, window=2, num_global=n),
        (0, 1, 13),
    ),
    "block_size": (
        lambda n: masks.block_causal_document(_PADDED[:2, :13], block_size=n),
        (1, 3, 50),
    ),
    "prefix_lm": (lambda n: masks.prefix_lm(13, prefix_len=n), (0, 4, 99)),
    "prefix_lm_document": (
        lambda n: masks.prefix_lm_document(_PADDED[:2, :13], prefix_len=n),
        (0, 2, 50),
    ),
    "hash_sparse": (
        lambda n: masks.hash_sparse(_BUCKETS[0, 0, :9], _BUCKETS[1, 0, :13])
        & masks.causal(9, 13, offset=n),
        (0, 3),
    ),
}


class NumbersTest(parameterized.TestCase):

  @parameterized.parameters(*_NUMBERS)
  def test_a_traced_number_is_as_good_as_a_known_one(self, name):
    make, values = _NUMBERS[name]
    dense = jax.jit(lambda n: masks.allowed(make(n), 13))
    for value in values:
      np.testing.assert_array_equal(
          masks.allowed(make(value), 13), dense(jnp.int32(value))
      )

  @parameterized.parameters("causal", "window", "sinks", "prefix_lm")
  def test_each_sequence_may_have_its_own(self, name):
    make, values = _NUMBERS[name]
    several = masks.allowed(make(np.array(values)), 13)
    for one, value in zip(several, values, strict=True):
      np.testing.assert_array_equal(one, masks.allowed(make(value), 13))

  def test_a_traced_number_below_its_least_counts_as_the_least(self):
    mask = masks.sliding_window(9, window=jnp.int32(-7))
    np.testing.assert_array_equal(masks.allowed(mask, 9), np.eye(9))

  @parameterized.parameters(1.5, "3", True)
  def test_refuses_what_is_no_integer(self, offset):
    with self.assertRaisesRegex(ValueError, "offset=.* must be an integer"):
      spans.number("offset", offset)


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
