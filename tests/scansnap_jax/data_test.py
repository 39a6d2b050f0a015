import dataclasses
import functools
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scansnap_jax import config as config_lib
from scansnap_jax import data
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import npz_file

# Six standard errors: a chance of 2e-9 for each of some hundred comparisons.
_NUM_SIGMAS = 6


def _sample(classes, *, batch_size, seq_len, seed=0):
  return data.sample_batch(
      jax.random.key(seed),
      jnp.asarray(classes.support_probs),
      jnp.asarray(classes.class_cdf),
      batch_size=batch_size,
      seq_len=seq_len,
  )


def _spread(classes, batch):
  return data.to_token_counts(
      batch,
      jnp.asarray(classes.support),
      jnp.asarray(classes.query),
      jnp.asarray(classes.label),
      classes.num_tokens,
  )


class MakeClassesTest(parameterized.TestCase):

  @parameterized.parameters(
      # num_last, num_next_per_last, M: Syn-Small, then the four Syn-Medium.
      (2, 1, 34),
      (1, 2, 33),
      (3, 2, 79),
      (5, 2, 125),
      (10, 2, 240),
  )
  def test_vocabulary_sizes_of_the_paper(self, num_last, per_last, num_tokens):
    config = config_lib.DataConfig(num_next_per_last=per_last)
    classes = data.make_classes(config, num_last)
    self.assertEqual(classes.num_tokens, num_tokens)
    self.assertEqual(classes.num_classes, num_last * per_last)

  def test_syn_small_probabilities(self):
    # Ten common weights of 1 and linspace(.1, 1, 10) sum to 10 + 5.5 = 15.5.
    classes = data.make_classes(config_lib.DataConfig(), 2)
    expected = np.zeros((2, 34))
    expected[:, :10] = 1 / 15.5
    expected[0, 10:20] = expected[1, 20:30] = np.linspace(0.1, 1, 10) / 15.5
    chex.assert_trees_all_close(classes.probs, expected, rtol=1e-14)
    np.testing.assert_array_equal(classes.query, [30, 31])
    np.testing.assert_array_equal(classes.label, [32, 33])

  def test_tokens_common_to_one_query_are_shared_by_its_classes_alone(self):
    config = config_lib.DataConfig(
        num_next_per_last=2,
        num_common=3,
        num_common_per_last=2,
        num_distinct_per_next=4,
    )
    classes = data.make_classes(config, 2)
    # ids: 0-2 common, 3-4 and 5-6 of the two queries, then 4 distinct a class.
    occurs = classes.probs > 0
    np.testing.assert_array_equal(occurs[:, :3], True)
    np.testing.assert_array_equal(occurs[:, 3], [True, True, False, False])
    np.testing.assert_array_equal(occurs[:, 6], [False, False, True, True])
    np.testing.assert_array_equal(classes.is_common.sum(axis=1), 5)
    np.testing.assert_array_equal(classes.is_distinct.sum(axis=1), 4)
    np.testing.assert_array_equal(classes.query, [23, 23, 24, 24])

  def test_support_lists_each_class_of_unequal_sizes(self):
    classes = data.SequenceClasses(
        probs=np.array([[0.5, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]]),
        query=np.array([3, 3]),
        label=np.array([0, 1]),
        class_probs=np.array([0.25, 0.75]),
    )
    np.testing.assert_array_equal(classes.support, [[0, 2], [1, 0]])
    np.testing.assert_array_equal(classes.support_probs, [[0.5, 0.5], [1, 0]])

  @parameterized.named_parameters(
      ("rows", dict(probs=np.diag([1.0, 0.9])), "row 1 sums to 0.9"),
      ("negative", dict(probs=np.array([[1.5, -0.5]] * 2)), "-0.5"),
      ("classes", dict(class_probs=np.array([0.5, 0.0])), "sums to 0.5"),
      ("query", dict(query=np.array([0, 3])), "0 to 2"),
      ("label", dict(label=np.array([0])), r"\(2,\)"),
      ("single", dict(probs=np.array([[0.5, 0.5]])), "one class"),
  )
  def test_inconsistent_classes_are_refused(self, change, message):
    fields = dict(
        probs=np.array([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]),
        query=np.array([0, 0]),
        label=np.array([1, 2]),
        class_probs=np.array([0.5, 0.5]),
    )
    data.SequenceClasses(**fields)
    with self.assertRaisesRegex(errors.UserError, message):
      data.SequenceClasses(**(fields | change))

  def test_a_class_without_distinct_tokens_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, r"Classes \[1\]"):
      data.SequenceClasses(
          probs=np.array([[0.5, 0.5], [1.0, 0.0]]),
          query=np.array([0, 0]),
          label=np.array([0, 1]),
          class_probs=np.array([0.5, 0.5]),
      )


class LoadClassesTest(parameterized.TestCase):

  def test_a_saved_setting_is_the_made_one(self):
    made = data.make_classes(config_lib.DataConfig(num_next_per_last=2), 3)
    path = self.create_tempfile("classes.npz").full_path
    np.savez(path, **dataclasses.asdict(made))
    read = data.make_classes(config_lib.DataConfig(classes_file=path), 1)
    chex.assert_trees_all_equal(
        dataclasses.asdict(read), dataclasses.asdict(made)
    )

  def test_class_probs_default_to_uniform(self):
    path = self.create_tempfile("classes.npz").full_path
    np.savez(path, probs=np.eye(3), query=[0, 0, 0], label=[0, 1, 2])
    np.testing.assert_allclose(data.load_classes(path).class_probs, 1 / 3)

  def test_what_unpacks_to_more_than_memory_is_refused_by_its_header(self):
    path = self.create_tempfile("classes.npz").full_path
    np.savez_compressed(path, probs=np.zeros((2, 1000)))
    read = functools.partial(npz_file.read, most_bytes=10_000)
    with mock.patch.object(npz_file, "read", read):
      with self.assertRaisesRegex(errors.UserError, "unpacks to 16128 bytes"):
        data.load_classes(path)

  @parameterized.named_parameters(
      ("absent", None, "no readable .npz"),
      ("empty", b"", "no readable .npz"),
      ("garbage", b"PK\x03\x04 no zip", "no readable .npz"),
      (
          "text",
          dict(probs=[["a", "b"]] * 2, query=[0, 0], label=[0, 1]),
          "probs must hold floats",
      ),
      (
          "fractional_ids",
          dict(probs=np.eye(2), query=[0.9, 0.1], label=[0, 1]),
          "query must hold integers",
      ),
      (
          "no_class",
          dict(
              probs=np.zeros((0, 0)),
              query=np.zeros(0, int),
              label=np.zeros(0, int),
          ),
          r"two classes or more, got \(0, 0\)",
      ),
      ("incomplete", dict(probs=np.eye(2)), r"lacks \['label', 'query'\]"),
      ("rank", dict(probs=[1.0], query=[0], label=[0]), r"\[K, M\].*\(1,\)"),
  )
  def test_bad_files_are_named(self, content, message):
    path = self.create_tempdir().full_path + "/classes.npz"
    if isinstance(content, dict):
      np.savez(path, **content)
    elif content is not None:
      with open(path, "wb") as file:
        file.write(content)
    with self.assertRaisesRegex(errors.UserError, message):
      data.load_classes(path)


class SampleBatchTest(parameterized.TestCase):

  @parameterized.parameters(2, 128, 100_000)
  @pytest.mark.slow
  def test_counts_are_multinomial(self, seq_len):
    classes = data.make_classes(config_lib.DataConfig(num_next_per_last=2), 1)
    batch_size = 4000
    batch = jax.jit(
        _sample, static_argnums=0, static_argnames=("batch_size", "seq_len")
    )(classes, batch_size=batch_size, seq_len=seq_len)
    counts = np.asarray(_spread(classes, batch).counts, np.float64)
    np.testing.assert_array_equal(counts.sum(axis=1), seq_len - 1)
    for n in range(2):
      mine = counts[np.asarray(batch.class_index) == n]
      p, trials = classes.probs[n], seq_len - 1
      variance = trials * p * (1 - p)
      mean_error = np.sqrt(variance / len(mine))
      np.testing.assert_array_less(
          np.abs(mine.mean(axis=0) - trials * p),
          _NUM_SIGMAS * mean_error + 1e-9,
      )
      # cov(n_k, n_l) = -T p_k p_l: negative, unlike for independent counts.
      covariance = np.cov(mine[:, 0], mine[:, 1])
      np.testing.assert_allclose(
          covariance[0, 1],
          -trials * p[0] * p[1],
          atol=_NUM_SIGMAS * variance[0] / np.sqrt(len(mine)),
      )
      np.testing.assert_allclose(
          covariance[0, 0],
          variance[0],
          rtol=_NUM_SIGMAS * np.sqrt((2 + 1 / variance[0]) / len(mine)),
      )

  def test_padding_of_a_short_class_leaves_the_count_of_token_0(self):
    # Class 0 has two of the tokens, class 1 has three: row 0 is padded.
    probs = np.array([[0.5, 0.5, 0, 0, 0], [0.2, 0, 0.4, 0.4, 0]])
    classes = data.SequenceClasses(
        probs=probs,
        query=np.array([4, 4]),
        label=np.array([0, 1]),
        class_probs=np.array([0.5, 0.5]),
    )
    batch = data.Batch(jnp.array([0, 1]), jnp.asarray(classes.support_probs))
    np.testing.assert_allclose(_spread(classes, batch).counts, probs)

  def test_classes_follow_their_probabilities_and_padding_is_never_drawn(self):
    class_cdf = jnp.array([0.7, 0.9, 1.0, 1.0])
    batch = data.sample_batch(
        jax.random.key(1),
        jnp.ones((4, 1)),
        class_cdf,
        batch_size=20_000,
        seq_len=2,
    )
    frequency = np.bincount(batch.class_index, minlength=4) / 20_000
    np.testing.assert_allclose(
        frequency,
        [0.7, 0.2, 0.1, 0.0],
        atol=_NUM_SIGMAS * np.sqrt(0.25 / 20_000),
    )
    self.assertEqual(frequency[3], 0)

  @pytest.mark.slow
  def test_infinite_length_gives_the_probabilities(self):
    classes = data.make_classes(config_lib.DataConfig(num_next_per_last=2), 3)
    batch = _sample(classes, batch_size=32, seq_len=None)
    tokens = _spread(classes, batch)
    chex.assert_trees_all_close(
        tokens.counts, classes.probs[batch.class_index].astype(np.float32)
    )
    np.testing.assert_array_equal(
        tokens.query, classes.query[batch.class_index]
    )
    np.testing.assert_array_equal(
        tokens.label, classes.label[batch.class_index]
    )


class SampleSequencesTest(parameterized.TestCase):

  def test_sequences_hold_query_last_and_count_like_the_classes(self):
    classes = data.make_classes(config_lib.DataConfig(num_next_per_last=2), 3)
    seq_len, batch_size = 64, 2000
    tokens, label = data.sample_sequences(
        jax.random.key(0), classes, batch_size=batch_size, seq_len=seq_len
    )
    chex.assert_shape(tokens, (batch_size, seq_len))
    class_index = np.asarray(label) - classes.label[0]
    np.testing.assert_array_equal(tokens[:, -1], classes.query[class_index])
    counts = np.asarray(data.count_tokens(tokens, classes.num_tokens))
    np.testing.assert_array_equal(counts.sum(axis=1), seq_len - 1)
    for n in range(classes.num_classes):
      mine = counts[class_index == n]
      p, trials = classes.probs[n], seq_len - 1
      sigma = np.sqrt(trials * p * (1 - p) / len(mine))
      error = np.abs(mine.mean(axis=0) - trials * p)
      np.testing.assert_array_less(error, _NUM_SIGMAS * sigma + 1e-9)


if __name__ == "__main__":
  absltest.main()
