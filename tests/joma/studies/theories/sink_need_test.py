import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import pytest

from joma.studies.systems.probes import first_tokens
from joma.studies.theories import sink_need
from scansnap_jax.experiment import errors
from tests.joma.studies.theories import small

_CONFIG = sink_need.SinkNeedConfig(width=3, length=5, batch_size=4000)


def _head(kind, has_begin, **sizes):
  config = dataclasses.replace(_CONFIG, **sizes)
  return sink_need.Head(config=config, kind=kind, has_begin=has_begin)


def _reads(width, scale):
  """Parameters that weigh all tokens alike and read `scale` times each."""
  size = width + 3
  value = np.zeros((size, width))
  value[:width] = scale * np.eye(width)
  zeros = np.zeros((size, 2 * width))
  return dict(query=zeros, key=zeros, value=value, sink=np.zeros(()))


class FloorTest(parameterized.TestCase):

  def test_is_the_least_loss_of_even_weights(self):
    """By drawn texts: the loss at scales around p, against the formula."""
    head, p = _head("softmax", False), _CONFIG.share
    spread = sink_need.mean_square(_CONFIG)
    self.assertAlmostEqual(spread, 3 * (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 5)
    for scale in (0.0, p, 0.6, 1.0):
      loss, _ = head.loss(_reads(3, scale), jax.random.key(1))
      expected = (p * (1 - scale) ** 2 + (1 - p) * scale**2) * spread
      np.testing.assert_allclose(loss, expected, rtol=0.03)
      self.assertGreater(expected, sink_need.floor(_CONFIG) - 1e-12)
    self.assertAlmostEqual(sink_need.floor(_CONFIG), p * (1 - p) * spread)

  @parameterized.parameters(
      ("softmax", True, 1.0),
      ("relu", True, 0.0),
      ("softmax", False, 1.0),
      ("sink", False, None),
  )
  def test_weights_sum_to_what_their_kind_allows(self, kind, has_begin, total):
    head = _head(kind, has_begin, batch_size=6)
    params = head.init(jax.random.key(0))
    params = params | {"query": np.zeros_like(params["query"])}
    tokens, _, _ = head.draw(jax.random.key(1))
    weights, read = head.attend(params, tokens)
    self.assertEqual(weights.shape, (6, 5, 5 + has_begin))
    self.assertEqual(read.shape, (6, 5, 3))
    sums = weights.sum(axis=-1)
    if total is None:  # Beside a logit of 0 more, t of t + 1 shares.
      total = np.arange(1, 6) / np.arange(2, 7)
    np.testing.assert_allclose(sums, np.broadcast_to(total, (6, 5)), atol=1e-6)

  @parameterized.parameters(True, False)
  def test_weights_of_relu_are_over_the_tokens_so_far(self, has_begin):
    head = _head("relu", has_begin, batch_size=2)
    params = head.init(jax.random.key(0))
    tokens, _, _ = head.draw(jax.random.key(1))
    weights, _ = head.attend(params, tokens)
    query, key = (np.asarray(tokens @ params[k]) for k in ("query", "key"))
    first = int(has_begin)
    for t in range(5):
      logits = query[0, t + first] @ key[0, : t + 1 + first].T / 6**0.5
      expected = np.maximum(logits, 0) / (t + 1)
      np.testing.assert_allclose(
          weights[0, t, : t + 1 + first], expected, atol=1e-6
      )

  def test_an_answer_is_the_mean_so_far_at_a_trigger_alone(self):
    head = _head("softmax", True, batch_size=7)
    tokens, trigger, answers = map(np.asarray, head.draw(jax.random.key(3)))
    np.testing.assert_array_equal(tokens[:, 0, :-1], 0)
    held = tokens[:, 1:, :3]
    for b in range(7):
      for t in range(5):
        mean = held[b, : t + 1].mean(axis=0) if trigger[b, t] else np.zeros(3)
        np.testing.assert_allclose(answers[b, t], mean, atol=1e-6)


class FirstTokensTest(absltest.TestCase):

  def _real(self, alone, moved=0.0):
    first = np.full((4, 3), 0.6)
    return {
        "shifts": {"0": first, "64": first + moved},
        "alone": np.full((4, 3), alone) + 0.01 * np.eye(4, 3),
        "plain": np.full((4, 3), 0.02),
    }

  def test_claims_follow_the_numbers(self):
    holds = lambda real: [row["it"] for row in first_tokens.rate(real)]
    self.assertEqual(holds(self._real(0.5)), ["holds"] * 3)
    self.assertEqual(holds(self._real(0.1))[2], "FAILED")
    self.assertEqual(holds(self._real(0.5, moved=0.02))[1], "FAILED")


class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("sink_need")
    self.assertEqual([*summary["rows"]], [*sink_need.VARIANTS])
    self.assertLen(summary["claims"], 7)
    self.assertEqual(np.shape(summary["rows"]["ReLU"]["losses"]), (2, 2))
    figure, texts = small.drawn("sink_need")
    self.assertLen(figure.axes, 2)
    self.assertIn("softmax, sink logit", texts)

  def test_says_what_would_be_right(self):
    with self.assertRaisesRegex(errors.UserError, "share must lie in"):
      sink_need.SinkNeedConfig(share=1.0)
    with self.assertRaisesRegex(errors.UserError, "length"):
      sink_need.SinkNeedConfig(length=1)


if __name__ == "__main__":
  absltest.main()
