from absl.testing import absltest
import jax.numpy as jnp
import numpy as np
import pytest

from joma.studies.theories import adam_order
from tests.joma.studies.theories import small

_CONFIG = adam_order.AdamOrderConfig(num_steps=3, batch_size=4, seq_len=9)


def _slopes(decoder, logits, counts, query, label):
  """Means of Lemma 1's directions, by loops over samples."""
  size = len(decoder)
  total = [np.zeros((size, size)), np.zeros((size, size))]
  for count, m, n in zip(counts, query, label, strict=True):
    share = count * np.exp(logits[m])
    f = share / np.linalg.norm(share)
    alpha = np.exp(f @ decoder)
    error = np.eye(size)[n] - alpha / alpha.sum()
    g = decoder @ error
    total[0] += np.outer(f, error) / len(counts)
    total[1][m] += f * (g - f * (f @ g)) / len(counts)
  return total


class TrainTest(absltest.TestCase):

  def test_adam_steps_by_loops(self):
    classes = adam_order._classes()
    counts, index = adam_order.draw_batches(_CONFIG, 0)
    self.assertEqual(counts.shape, (3, 4, 34))
    np.testing.assert_array_equal(counts.sum(axis=2), 8)
    query, label = classes.query[index], classes.label[index]
    found = adam_order.train(
        "adam",
        jnp.float32(0.1),
        *(jnp.asarray(x) for x in (counts, query, label)),
    )
    params = [np.zeros((34, 34)), np.zeros((34, 34))]
    first = [np.zeros((34, 34)), np.zeros((34, 34))]
    second = [np.zeros((34, 34)), np.zeros((34, 34))]
    for step in range(3):
      slopes = _slopes(*params, counts[step], query[step], label[step])
      for i, slope in enumerate(slopes):
        first[i] = 0.9 * first[i] + 0.1 * slope
        second[i] = 0.999 * second[i] + 0.001 * slope**2
        mean = first[i] / (1 - 0.9 ** (step + 1))
        size = np.sqrt(second[i] / (1 - 0.999 ** (step + 1)))
        params[i] = params[i] + 0.1 * mean / (size + 1e-8)
    # A slope that is 0 but for rounding moves by whole steps.
    for n, m in enumerate(classes.query):
      seen = counts[index == n].sum(axis=0) > 0
      np.testing.assert_allclose(found[m, seen], params[1][m, seen], atol=0.02)

  @pytest.mark.slow
  def test_signs_make_shares_equal(self):
    config = adam_order.AdamOrderConfig(num_steps=100)
    classes = adam_order._classes()
    counts, index = adam_order.draw_batches(config, None)
    attn_logits = adam_order.train(
        "sign",
        jnp.float32(0.05),
        *(
            jnp.asarray(x)
            for x in (counts, classes.query[index], classes.label[index])
        ),
    )
    found = adam_order.read(np.asarray(attn_logits))
    own = np.linspace(1, 0.1, 10)
    total = found["logits"] + np.log(own)
    # Steps of .05 leave shares that far apart.
    self.assertLess(np.ptp(total, axis=1).max(), 0.11)
    np.testing.assert_allclose(found["entropy"], np.log(10), atol=2e-3)


class ReadTest(absltest.TestCase):

  def test_ranks_go_from_the_most_frequent(self):
    classes = adam_order._classes()
    logits = np.zeros((34, 34))
    found = adam_order.read(logits)
    np.testing.assert_array_equal(found["rank"], 1)
    weights = np.linspace(0.1, 1, 10) / 5.5
    np.testing.assert_allclose(
        found["entropy"], -(weights * np.log(weights)).sum(), rtol=1e-5
    )
    own = np.flatnonzero(classes.is_distinct[1])
    rarest = own[classes.probs[1, own].argmin()]
    logits[classes.query[1], rarest] = 3.0
    found = adam_order.read(logits)
    np.testing.assert_array_equal(found["rank"], [1, 10])
    self.assertEqual(found["logits"][1, -1], 3.0)

  def test_without_a_seed_the_batch_is_what_is_expected(self):
    counts, index = adam_order.draw_batches(_CONFIG, None)
    classes = adam_order._classes()
    np.testing.assert_array_equal(index, [[0, 1]] * 3)
    np.testing.assert_allclose(counts[2], classes.probs, rtol=1e-6)


class StudyTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("adam_order")
    self.assertLen(summary["claims"], 6)
    self.assertEqual(np.shape(summary["rows"]["SGD"]["rank"]), (2, 2, 2))
    figure, texts = small.drawn("adam_order")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["leading rank", "equal shares"], texts)


if __name__ == "__main__":
  absltest.main()
