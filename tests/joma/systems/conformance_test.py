"""What every attention system must do, run over all names.

Each run draws two of the twelve pairs of key heads and positions a system, by
its name and the day; `-m slow` runs all. A newcomer's line in `names.SYSTEMS`
is enough for it to be tested here.
"""

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
from joma.systems.cache_policies.by_place import full
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import layer_hooks
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied
from tests.joma.transformer.training.devices import eight_devices
from tests.laws import system_laws as laws

_KV_HEADS = (1, 2, 4)
_POSITIONS = ("rotary", "learned", "sinusoidal", "none")
_PAIRS = tuple(itertools.product(_KV_HEADS, _POSITIONS))
_NAMES = laws.NAMES
_ALL = [
    (name, *pair)
    for name in _NAMES
    for pair in _PAIRS
    if pair[0] > 1 or name not in laws.PAIRED
]


def _drawn(name, num):
  pairs = [pair for one, *pair in _ALL if one == name]
  return [pairs[i] for i in laws.order(name, len(pairs))[:num]]


def _drawn_names(num):
  return [_NAMES[i] for i in laws.order("names", len(_NAMES))[:num]]


def _model(name, pair):
  return laws.model(laws.small(name), *pair, laws.num_layers(name))


def _own_params(config):
  """Those of its systems alone."""
  key = jax.random.key(0)
  found = layer_hooks.of_layer(config, 0).systems
  own = [one for one in found if isinstance(one, hooks.Parametric)]
  return lambda: [one.init_params(key, config, 0) for one in own]


class LawsTest(parameterized.TestCase):

  def _check_rows(self, name, run, tokens, found):
    laws.check_rows(run, tokens, found, not laws.sees_later(name))

  def _check_with_gradients(self, name, *pair):
    model, params, tokens = _model(name, pair)
    run = functools.partial(laws.with_gradients, model, params)
    _, grads, found = run(tokens, laws.steps(tokens.shape))
    laws.check_gradients(grads)
    self._check_rows(name, lambda *text: run(*text)[2], tokens, found)

  def _check_logits(self, name, *pair):
    model, params, tokens = _model(name, pair)
    run = functools.partial(laws.logits, model, params)
    found = run(tokens, laws.steps(tokens.shape))
    self._check_rows(name, run, tokens, found)

  def _check_neutral(self, name, pair, run):
    """Where there is a neutral setting it is softmax."""
    neutral = laws.system(name).neutral
    if not neutral:
      return
    num_layers = laws.num_layers(name)
    model, params, tokens = laws.model(neutral, *pair, num_layers)
    plain, _, _ = laws.model("", *pair, num_layers)
    text = (tokens, laws.steps(tokens.shape))
    got, want = (run(one, params, *text) for one in (model, plain))
    chex.assert_trees_all_close(got, want, atol=1e-6)

  @parameterized.parameters(*_NAMES)
  @pytest.mark.slow
  def test_two_drawn_pairs(self, name):
    first, second = _drawn(name, 2)
    self._check_with_gradients(name, *first)
    self._check_logits(name, *second)
    self._check_neutral(name, second, laws.logits)

  @parameterized.parameters(*_ALL)
  @pytest.mark.slow
  def test_all_pairs(self, name, *pair):
    self._check_with_gradients(name, *pair)

    def without_own(model, params, *text):
      loss, grads, logits = laws.with_gradients(model, params, *text)
      for layer in range(laws.num_layers(name)):
        grads[f"layers_{layer}"]["attn"].pop(name, None)
      return loss, grads, logits

    self._check_neutral(name, pair, without_own)
    self._check_types(name, pair)

  def _check_types(self, name, pair):
    """Numbers in bfloat16; layers that are computed anew."""
    model, params, tokens = _model(name, pair)
    text = (tokens, laws.steps(tokens.shape))
    chex.assert_tree_all_finite(
        laws.with_gradients(model.clone(dtype=jnp.bfloat16), params, *text)
    )
    got, want = (
        laws.with_gradients(one, params, *text)
        for one in (model.clone(remat="full"), model)
    )
    # XLA fuses the two in other ways: equal to some last bits of the largest.
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(want))
    chex.assert_trees_all_close(got, want, atol=1e-6 * max(largest, 1.0))

  @parameterized.parameters(*_drawn_names(2))
  @pytest.mark.by_default(0)
  def test_other_types_and_what_is_computed_anew(self, name):
    self._check_types(name, _drawn(name, 1)[0])


class CacheTest(parameterized.TestCase):

  def _check(self, name, *pair, num_caches=2):
    model, params, tokens = self._causal(name, pair)
    want = laws.logits(model, params, tokens, laws.steps(tokens.shape))
    for cache in itertools.islice(self._caches(model), num_caches):
      laws.check_steps(model, params, tokens, want, cache)

  def _causal(self, name, pair):
    """What is not causal stands in its neutral setting."""
    later = laws.sees_later(name)
    entry = laws.system(name).neutral if later else laws.small(name)
    return laws.model(entry, *pair, laws.num_layers(name))

  def test_no_two_arrays_of_a_new_layer_or_cache_are_one(self):
    """Else a step that writes in place would be given one twice."""
    for name in _NAMES:
      shape = (2, "rotary", laws.num_layers(name))
      config = laws.config(laws.small(name), *shape)
      made = [full_cache.init(config, 3, laws.LENGTH), _own_params(config)()]
      places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(made)]
      self.assertLen({*places}, len(places), name)

  def test_a_step_gives_back_what_it_was_given(self):
    """Also types that are weak, or the second step would compile again."""
    for name in _NAMES:
      shape = (2, "rotary", laws.num_layers(name))
      config = laws.config(laws.small(name), *shape)
      params = jax.eval_shape(_own_params(config))
      cache = jax.eval_shape(lambda c=config: full_cache.init(c, 3, 12))
      for path, leaf in jax.tree_util.tree_leaves_with_path((params, cache)):
        where = jax.tree_util.keystr(path)
        self.assertFalse(leaf.weak_type, f"{name}, {where}")

  @parameterized.parameters(*_NAMES)
  @pytest.mark.slow
  def test_a_second_prompt_goes_on_from_the_first(self, name):
    """Of five tokens, then of six and of four, one row being shorter."""
    model, params, tokens = self._causal(name, _drawn(name, 1)[0])
    want = laws.logits(model, params, tokens, laws.steps(tokens.shape))
    cache = full_cache.init(model.config, 3, laws.LENGTH)
    first = laws.steps((3, 5))
    logits, cache = applied.step(model, params, tokens[:, :5], first, cache)
    chex.assert_trees_all_close(logits, want[:, :5], atol=1e-5)
    second = laws.steps((3, 6), (6, 4, 6))
    second = np.where(second < 0, -1, second + 5)
    logits, _ = applied.step(model, params, tokens[:, 5:11], second, cache)
    for row, length in enumerate((6, 4, 6)):
      chex.assert_trees_all_close(
          logits[row, :length], want[row, 5 : 5 + length], atol=1e-5
      )

  def _caches(self, model):
    """The cache that keeps everything, and slots where they can follow."""
    yield full_cache.init(model.config, 3, laws.LENGTH)
    slots = kv_cache.init(full.Full(), model.config, 3, laws.LENGTH)
    one = jnp.zeros((3, 1), jnp.int32)
    start = lambda cache: model.init(jax.random.key(0), one, kv_cache=cache)
    try:
      jax.eval_shape(start, slots)
    except errors.UserError as error:  # It names who cannot be followed.
      self.assertIn("cannot follow", str(error))
    else:
      yield slots

  @parameterized.parameters(*_NAMES)
  @pytest.mark.by_default(0)
  def test_prompts_and_steps_equal_one_pass(self, name):
    self._check(name, *_drawn(name, 2)[1], num_caches=1)

  @parameterized.parameters(*_ALL)
  @pytest.mark.slow
  def test_all_pairs_and_caches(self, *case):
    self._check(*case)


class MeshTest(parameterized.TestCase):

  @parameterized.parameters(*range(4))
  @pytest.mark.slow
  def test_eight_devices_compute_what_one_does(self, part):
    entries = [laws.small(name) for name in _NAMES[part::4]]
    layers = [laws.num_layers(name) for name in _NAMES[part::4]]
    found = eight_devices.differences([
        dict(attention=[entry], num_layers=num)
        for entry, num in zip(entries, layers, strict=True)
    ])
    for entry, error in zip(entries, found, strict=True):
      self.assertLess(error, 1e-6, entry)


if __name__ == "__main__":
  absltest.main()
