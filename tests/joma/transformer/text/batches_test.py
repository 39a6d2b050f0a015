from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from joma.transformer.text import batches as batches_lib
from joma.transformer.text import corpus as corpus_lib
from scansnap_jax.experiment import errors

_TOKENS = np.arange(1000, dtype=np.uint16)


def _random(**changes):
  return batches_lib.RandomBatches(
      **({"tokens": _TOKENS, "batch_size": 6, "seq_len": 7} | changes)
  )


def _sequential(**changes):
  return batches_lib.SequentialBatches(
      **({"tokens": _TOKENS, "batch_size": 6, "seq_len": 7} | changes)
  )


def _philox(key, counter):
  """Philox 4x64-10 of Salmon et al. (https://doi.org/10.1145/2063384.2063405).

  numpy counts up before it draws, so that its first block has counter 1.
  """
  keys, words, mask = [key, 0], list(counter), 2**64 - 1
  for _ in range(10):
    high_0, low_0 = divmod(words[0] * 0xD2E7470EE14C6C93, 2**64)
    high_1, low_1 = divmod(words[2] * 0xCA5A826395121157, 2**64)
    words = [
        high_1 ^ words[1] ^ keys[0],
        low_1,
        high_0 ^ words[3] ^ keys[1],
        low_0,
    ]
    keys[0] = (keys[0] + 0x9E3779B97F4A7C15) & mask
    keys[1] = (keys[1] + 0xBB67AE8584CAA73B) & mask
  return words


def _assert_equal(actual, expected):
  for field, other in zip(actual, expected, strict=True):
    np.testing.assert_array_equal(field, other)
    assert field.dtype == other.dtype


class BothTest(parameterized.TestCase):

  @parameterized.product(make=(_random, _sequential), process_count=(2, 3, 6))
  def test_rows_of_all_processes_are_the_batch(self, make, process_count):
    batches = make()
    for step in (0, 5, batches.steps_per_epoch - 1):
      parts = [
          batches.batch(3, step, i, process_count) for i in range(process_count)
      ]
      together = [np.concatenate(field) for field in zip(*parts, strict=True)]
      _assert_equal(batches_lib.Batch(*together), batches.batch(3, step))

  @parameterized.parameters(_random, _sequential)
  def test_a_batch_depends_on_its_step_alone(self, make):
    batches, others = make(), make()
    for step in (11, 3, 3):
      others.batch(1, step)
    _assert_equal(batches.batch(1, 11), others.batch(1, np.int64(11)))

  @parameterized.parameters(_random, _sequential)
  def test_targets_come_next_and_shapes_are_the_same(self, make):
    batches = make()
    for step in range(batches.steps_per_epoch):
      batch = batches.batch(0, step)
      counts = batch.weights > 0
      chosen = np.where(counts, batch.targets, 0)
      np.testing.assert_array_equal(
          chosen, np.where(counts, batch.inputs + 1, 0)
      )
      for field in batch:
        self.assertEqual(field.shape, (6, 7))
      self.assertEqual(batch.inputs.dtype, np.int32)
      self.assertEqual(batch.weights.dtype, np.float32)

  @parameterized.parameters(_random, _sequential)
  def test_mapped_tokens_give_the_same(self, make):
    folder = self.create_tempdir().full_path
    np.save(f"{folder}/ids.npy", _TOKENS)
    mapped = np.load(f"{folder}/ids.npy", mmap_mode="r")
    _assert_equal(make(tokens=mapped).batch(0, 4), make().batch(0, 4))

  @parameterized.product(make=(_random, _sequential))
  def test_what_cannot_be_is_refused(self, make):
    with self.assertRaisesRegex(errors.UserError, "multiple of the 4 proc"):
      make().batch(0, 0, 0, 4)
    with self.assertRaisesRegex(errors.UserError, "process_index must be from"):
      make().batch(0, 0, 2, 2)
    with self.assertRaisesRegex(errors.UserError, "tokens"):
      make(tokens=_TOKENS[:5])
    with self.assertRaisesRegex(errors.UserError, "seq_len"):
      make(seq_len=0)


class RandomTest(parameterized.TestCase):

  @parameterized.parameters((1, 2), (2**64 - 1, 2**40))
  def test_starts_are_bits_of_a_published_generator(self, seed, step):
    # Other bits in a later numpy would make old runs resume with other data.
    starts = _random(batch_size=4).batch(seed, step).inputs[:, 0]
    expected = [bits % 993 for bits in _philox(seed, (1, 0, 0, step))]
    self.assertEqual(starts.tolist(), expected)

  def test_seeds_and_steps_differ(self):
    batches = _random()
    starts = {
        tuple(batches.batch(seed, step).inputs[:, 0])
        for seed in (0, 1, 2**64 - 1)
        for step in (0, 1, 2**40)
    }
    self.assertLen(starts, 9)

  def test_every_window_is_drawn_and_equally_often(self):
    batches = _random(tokens=_TOKENS[:17], batch_size=5000)
    starts = batches.batch(0, 0).inputs[:, 0]
    counts = np.bincount(starts, minlength=10)
    self.assertLen(counts, 10)  # Starts 0 to 9: the last has its target.
    # Five standard deviations of a binomial of 5000 with p = .1.
    np.testing.assert_allclose(counts, 500, atol=5 * np.sqrt(450))

  def test_the_shortest_text_has_one_window(self):
    batch = _random(tokens=_TOKENS[:8]).batch(0, 0)
    np.testing.assert_array_equal(batch.inputs, [range(7)] * 6)
    np.testing.assert_array_equal(batch.targets, [range(1, 8)] * 6)

  def test_an_epoch_reads_as_many_tokens_as_there_are(self):
    self.assertEqual(_random().steps_per_epoch, 1000 // 42)


class SequentialTest(parameterized.TestCase):

  def test_columns_walk_through_their_stretch(self):
    # 6 stretches of 166 tokens; the last four tokens are left out.
    batches = _sequential()
    first = batches.batch(0, 0)
    np.testing.assert_array_equal(first.inputs[:, 0], 166 * np.arange(6))
    second = batches.batch(0, 1)
    np.testing.assert_array_equal(second.inputs[:, 0], first.inputs[:, 0] + 7)

  def test_the_last_batch_is_short_and_then_the_text_starts_again(self):
    batches = _sequential()
    self.assertEqual(batches.steps_per_epoch, 24)  # 165 = 23 * 7 + 4.
    last = batches.batch(0, 23)
    np.testing.assert_array_equal(last.weights, [[1, 1, 1, 1, 0, 0, 0]] * 6)
    np.testing.assert_array_equal(last.inputs[:, 4:], 0)
    self.assertEqual(last.targets[-1, 3], 995)
    _assert_equal(batches.batch(0, 24), batches.batch(7, 0))

  def test_a_stretch_that_fills_its_batches_has_no_empty_one(self):
    batches = _sequential(tokens=_TOKENS[: 6 * 15])
    self.assertEqual(batches.steps_per_epoch, 2)
    self.assertEqual(batches.batch(0, 1).weights.min(), 1)

  def test_numbers_of_the_published_runs(self):
    batches = _sequential(
        tokens=np.zeros(2_049_990, np.uint16), batch_size=20, seq_len=35
    )
    self.assertEqual(batches.steps_per_epoch, 2929)
    self.assertEqual(batches.batch(0, 2927).weights.sum(), 20 * 35)
    self.assertEqual(batches.batch(0, 2928).weights.sum(), 20 * 18)

  def test_evaluation_counts_every_target_once(self):
    seen = np.concatenate([
        batch.targets[batch.weights > 0]
        for batch in batches_lib.evaluation(_TOKENS, seq_len=7)
    ])
    expected = np.delete(np.arange(1000), 100 * np.arange(10))
    np.testing.assert_array_equal(np.sort(seen), expected)


class GrainTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    pytest.importorskip("grain")
    tokens = corpus_lib.load().train[:4000]
    self.batches = [
        _random(tokens=tokens),
        _sequential(tokens=tokens),
    ]

  def test_first_batches_are_the_same(self):
    for batches in self.batches:
      dataset = batches_lib.as_grain(
          batches, 5, 8, process_index=1, process_count=2
      )
      self.assertLen(dataset, 8)
      for step, batch in enumerate(dataset.to_iter_dataset()):
        _assert_equal(batch, batches.batch(5, step, 1, 2))
      self.assertEqual(step, 7)

  def test_a_saved_state_resumes(self):
    batches = self.batches[0]
    dataset = batches_lib.as_grain(batches, 5, 20).to_iter_dataset()
    iterator = iter(dataset)
    for _ in range(3):
      next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(3)]
    again = iter(dataset)
    again.set_state(state)
    for batch in expected:
      _assert_equal(next(again), batch)
    _assert_equal(expected[0], batches.batch(5, 3))


if __name__ == "__main__":
  absltest.main()
