"""Which guesses stay: the distribution is the model's, by enumeration."""

import fractions
import itertools

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np

from joma.inference.speculative import rule

_VOCAB, _GUESSES = 3, 2
# Quarters, so that p / q is a twelfth or coarser: 12 uniforms know them all.
_GRID = 12
_DRAFTS = {
    "unlike": ([2, 1, 1], [[1, 2, 1], [1, 1, 2], [2, 1, 1]]),
    "narrow": ([0, 3, 1], [[4, 0, 0], [1, 3, 0], [0, 0, 4]]),
    "the model": ([1, 2, 1], [[2, 1, 1], [1, 0, 3], [0, 4, 0]]),
}
# The model: of the first token, of the second by the first, and so on.
_FIRST, _NEXT = [1, 2, 1], [[2, 1, 1], [1, 0, 3], [0, 4, 0]]


def _drawn(first, after):
  """Every guess of two tokens, with its probability."""
  for pair in itertools.product(range(_VOCAB), repeat=_GUESSES):
    chance = fractions.Fraction(first[pair[0]] * after[pair[0]][pair[1]], 16)
    if chance:
      yield pair, chance


def _behind(pair):
  """The model's quarters behind the newest token and behind each guess."""
  return [_FIRST, _NEXT[pair[0]], _NEXT[pair[1]]]


def _uniforms():
  """Pairs of numbers in [0, 1), the middles of twelfths."""
  grid = (np.arange(_GRID) + 0.5) / _GRID
  return np.array(list(itertools.product(grid, repeat=_GUESSES)), np.float32)


def _outcomes(first, after):
  """Probability of each first, each pair and each triple of tokens."""
  found = {}
  uniforms = _uniforms()
  repeat = lambda x: jnp.repeat(jnp.array([x]), len(uniforms), axis=0)
  for pair, chance in _drawn(first, after):
    counts, weights = rule.accept(
        repeat(_behind(pair)) / 4.0,
        repeat([first, after[pair[0]]]) / 4.0,
        repeat(pair),
        jnp.asarray(uniforms),
    )
    weights = np.asarray(weights, np.float64)
    for count, row in zip(np.asarray(counts), weights, strict=True):
      for token, weight in enumerate(row / row.sum()):
        came = (*pair[:count], token)
        found[came] = found.get(came, 0) + float(chance) * weight / len(
            uniforms
        )
  return found


def _continued(found, length):
  """Texts of `length` tokens, the model going on where a round ended."""
  texts = {}
  for came, chance in found.items():
    whole = [(came[:length], chance)]
    while len(whole[0][0]) < length:
      whole = [
          ((*text, token), p * _NEXT[text[-1]][token] / 4)
          for text, p in whole
          for token in range(_VOCAB)
      ]
    for text, p in whole:
      texts[text] = texts.get(text, 0) + p
  return texts


class RuleTest(parameterized.TestCase):

  @parameterized.parameters(*_DRAFTS)
  def test_texts_have_the_models_probabilities(self, name):
    """Over all guesses and all uniforms of a grid: no draw, no tolerance."""
    found = _outcomes(*_DRAFTS[name])
    texts = _continued(found, 3)
    for text in itertools.product(range(_VOCAB), repeat=3):
      want = _FIRST[text[0]] * _NEXT[text[0]][text[1]] * _NEXT[text[1]][text[2]]
      self.assertAlmostEqual(texts.get(text, 0), want / 64, places=7, msg=text)

  def test_a_draft_that_is_the_model_is_never_refused(self):
    found = _outcomes(*_DRAFTS["the model"])
    self.assertEqual({len(came) for came in found}, {_GUESSES + 1})

  def test_a_draft_of_no_numbers_leaves_the_model_alone(self):
    target = jnp.array([[[0.5, 0.5], [0.0, 1.0]]])
    count, weights = rule.accept(
        target,
        jnp.full((1, 1, 2), jnp.nan),
        jnp.array([[0]]),
        jnp.zeros((1, 1)),
    )
    self.assertEqual(count[0], 0)
    np.testing.assert_array_equal(weights, [[0.5, 0.5]])

  def test_greedy_guesses_stay_up_to_the_first_that_is_wrong(self):
    best = jnp.array([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    guesses = jnp.array([[5, 6, 7], [5, 9, 7], [9, 6, 7]])
    count, behind = rule.greedy(best, guesses)
    self.assertEqual(count.tolist(), [3, 1, 0])
    self.assertEqual(behind.tolist(), [8, 6, 5])


if __name__ == "__main__":
  absltest.main()
