"""Two systems in one layer: refused in a sentence, or held to all laws.

Every run draws two of the pairs that a layer takes, by the day; `-m slow` has
all of them, with gradients.
"""

import functools
import itertools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import pytest

from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import layer_hooks
from scansnap_jax.experiment import errors
from tests.laws import system_laws as laws

_SHAPE = (2, "rotary")


def _refusal(pair):
  """What a layer says to a pair, or None where it takes it."""
  config = configs.TransformerConfig(num_layers=2, attention=("+".join(pair),))
  try:
    layer_hooks.of_layer(config, 0)
  except errors.UserError as error:
    return str(error)
  return None


_REFUSALS = {
    pair: _refusal(pair) for pair in itertools.combinations(laws.NAMES, 2)
}
_TAKEN = [pair for pair, refusal in _REFUSALS.items() if refusal is None]
_DRAWN = [_TAKEN[i] for i in laws.order("pairs of systems", len(_TAKEN))[:2]]


def _model(pair, neutral=()):
  """Of both; names in `neutral` stand in their neutral setting."""
  setting = lambda name: (
      laws.system(name).neutral if name in neutral else laws.small(name)
  )
  entry = "+".join(map(setting, pair))
  return laws.model(entry, *_SHAPE, laws.num_layers(*pair))


class PairsTest(parameterized.TestCase):

  def test_what_does_not_go_together_is_told_with_both_names(self):
    for pair, refusal in _REFUSALS.items():
      if refusal is not None:
        for name in pair:
          self.assertIn(name, refusal.partition(": ")[2])
        self.assertEndsWith(refusal, ".")
    self.assertGreater(len(_TAKEN), 200)

  def _check_steps(self, pair):
    """They equal a pass, or a selector's cache says whom it cannot follow."""
    model, params, tokens = _model(pair, [*filter(laws.sees_later, pair)])
    want = laws.logits(model, params, tokens, laws.steps(tokens.shape))
    cache = full_cache.init(model.config, 3, laws.LENGTH)
    try:
      laws.check_steps(model, params, tokens, want, cache)
    except errors.UserError as error:
      self.assertRegex(str(error), "^BlockCache cannot follow .* not both; a")
      for name in pair:
        self.assertIn(name, str(error))

  @parameterized.parameters(*_DRAWN)
  def test_two_drawn_pairs(self, *pair):
    model, params, tokens = _model(pair)
    run = functools.partial(laws.logits, model, params)
    found = run(tokens, laws.steps(tokens.shape))
    laws.check_rows(run, tokens, found, not any(map(laws.sees_later, pair)))
    self._check_steps(pair)

  @parameterized.parameters(*_TAKEN)
  @pytest.mark.slow
  def test_all_pairs(self, *pair):
    """Rows, gradients, steps; beside a neutral one the other is alone."""
    model, params, tokens = _model(pair)
    run = functools.partial(laws.with_gradients, model, params)
    text = (tokens, laws.steps(tokens.shape))
    _, grads, found = run(*text)
    laws.check_gradients(grads)
    is_causal = not any(map(laws.sees_later, pair))
    laws.check_rows(lambda *text: run(*text)[2], tokens, found, is_causal)
    self._check_steps(pair)
    for name, other in (pair, pair[::-1]):
      if laws.system(name).neutral:
        model, params, _ = _model(pair, (name,))
        alone = laws.model(
            laws.small(other), *_SHAPE, laws.num_layers(name, other)
        )[0]
        got, want = (laws.logits(m, params, *text) for m in (model, alone))
        chex.assert_trees_all_close(got, want, atol=1e-6)


if __name__ == "__main__":
  absltest.main()
