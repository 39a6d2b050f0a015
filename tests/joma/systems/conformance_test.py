"""What every attention system must do, run over all names.

Each run draws two of the twelve pairs of key heads and positions a system, by
its name and the day; `-m slow` runs all. A newcomer's line in `names.SYSTEMS`
is enough for it to be tested here.
"""

import datetime
import functools
import hashlib
import itertools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import kv_cache
from joma.systems import names
from joma.systems.cache_policies.by_place import full
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import layer_hooks
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied
from tests.joma.transformer.training.devices import eight_devices

# Options with which twelve tokens are enough to choose among.
_SMALL = {
    "duo_gates": "duo_gates:sinks=1:recent=2:start=0.5",
    "echo_att": "echo_att:first=0:last=0",
    "flux": "flux:sinks=1:window=3:pool=2:hidden=4:start=0.1",
    "grid_bias": "grid_bias:rows=3:columns=3:first=1:start=0.5",
    "grid_conv": "grid_conv:rows=3:columns=3:first=1",
    "hip": "hip:k=4:block=2",
    "hylra": "hylra:full=0:k=4:block=2",
    "indexer": "indexer:k=4",
    "landmark": "landmark:block=3:k=2",
    "moba": "moba:k=2:block=2",
    "moh_blocks": "moh_blocks:block=2",
    "moh_norms": "moh_norms:active=2:shared=1",
    "nats": "nats:chunk=3",
    "nsa": "nsa:k=2:block=2:window=3:compress=mlp:hidden=8",
    "superlinear": "superlinear:k=2:s=1:behind=0.5",
    "titans": "titans:chunk=3",
    "xattention": "xattention:stride=1:block=2:threshold=0.5",
}
# Systems of layers that take from the one before.
_TWO_LAYERS = ("echo_att", "hylra")
# Systems that take key heads in pairs refuse a single one.
_PAIRED = ("differential",)
_KV_HEADS = (1, 2, 4)
_POSITIONS = ("rotary", "learned", "sinusoidal", "none")
_PAIRS = tuple(itertools.product(_KV_HEADS, _POSITIONS))
_LENGTH, _PROMPT = 12, 7


_NAMES = tuple(sorted(names.SYSTEMS))
_ALL = [
    (name, *pair)
    for name in _NAMES
    for pair in _PAIRS
    if pair[0] > 1 or name not in _PAIRED
]


def _order(what, num):
  """Another one each day, the same on every worker."""
  day = f"{what} {datetime.date.today()}"
  seed = int(hashlib.sha256(day.encode()).hexdigest(), 16) % 2**32
  return np.random.default_rng(seed).permutation(num)


def _drawn(name, num):
  pairs = [pair for one, *pair in _ALL if one == name]
  return [pairs[i] for i in _order(name, len(pairs))[:num]]


def _drawn_names(num):
  return [_NAMES[i] for i in _order("names", len(_NAMES))[:num]]


def _small(name):
  return _SMALL.get(name, name)


def _config(entry, num_kv_heads, positions, num_layers=1):
  return configs.TransformerConfig(
      vocab_size=11,
      num_layers=num_layers,
      embed_dim=16,
      num_heads=4,
      num_kv_heads=num_kv_heads,
      head_dim=8,
      hidden_dim=16,
      max_len=_LENGTH,
      embed_scale=4.0,
      positions=positions,
      attention=(entry,) if entry else (),
  )


@functools.cache
def _model(entry, num_kv_heads, positions, num_layers=1):
  config = _config(entry, num_kv_heads, positions, num_layers)
  model = models.Transformer(config, implementation="reference")
  tokens = np.random.default_rng(1).integers(0, 11, (3, _LENGTH), np.int32)
  return model, applied.params(model), tokens


def _num_layers(name):
  return 2 if name in _TWO_LAYERS else 1


def _system(name):
  (part,) = names.parts(name)
  return names.make(part)


def _steps(shape, lengths=None):
  steps = np.broadcast_to(np.arange(shape[1], dtype=np.int32)[None], shape)
  lengths = np.full(shape[0], shape[1]) if lengths is None else lengths
  return np.where(steps < np.asarray(lengths)[:, None], steps, -1)


def _logits(model, params, tokens, positions):
  found = applied.logits(model, params, tokens, positions)
  return jax.device_get(found)


def _with_gradients(model, params, tokens, positions):
  """Loss, gradients and logits."""
  found = applied.loss_and_grads(model, params, tokens, positions)
  return jax.device_get(found)


class LawsTest(parameterized.TestCase):

  def _check_rows(self, name, run, tokens, logits):
    """Later tokens, padding and other rows change nothing."""
    changed = tokens.copy()
    changed[0, _PROMPT:] = (tokens[0, _PROMPT:] + 1) % 11
    other = run(changed, _steps(tokens.shape))
    chex.assert_trees_all_close(other[1:], logits[1:], atol=1e-6)
    self.assertGreater(np.abs(other - logits)[0].max(), 1e-3)
    if isinstance(_system(name), hooks.SeesLater):
      return
    chex.assert_trees_all_equal(other[0, :_PROMPT], logits[0, :_PROMPT])
    padded = _steps(tokens.shape, (_PROMPT, _LENGTH, _LENGTH))
    other = run(changed, padded)
    chex.assert_trees_all_close(
        other[0, :_PROMPT], logits[0, :_PROMPT], atol=1e-6
    )
    chex.assert_trees_all_close(other[1:], logits[1:], atol=1e-6)

  def _check_with_gradients(self, name, num_kv_heads, positions):
    model, params, tokens = _model(
        _small(name), num_kv_heads, positions, _num_layers(name)
    )
    run = functools.partial(_with_gradients, model, params)
    _, grads, logits = run(tokens, _steps(tokens.shape))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
      where = jax.tree_util.keystr(path)
      self.assertTrue(np.isfinite(leaf).all(), where)
      self.assertGreater(np.abs(leaf).max(), 0, where)
    self._check_rows(name, lambda *text: run(*text)[2], tokens, logits)

  def _check_logits(self, name, num_kv_heads, positions):
    model, params, tokens = _model(
        _small(name), num_kv_heads, positions, _num_layers(name)
    )
    run = functools.partial(_logits, model, params)
    self._check_rows(name, run, tokens, run(tokens, _steps(tokens.shape)))

  def _check_neutral(self, name, pair, run):
    """Where there is a neutral setting it is softmax."""
    neutral = _system(name).neutral
    if not neutral:
      return
    model, params, tokens = _model(neutral, *pair, _num_layers(name))
    plain, _, _ = _model("", *pair, _num_layers(name))
    text = (tokens, _steps(tokens.shape))
    got, want = (run(one, params, *text) for one in (model, plain))
    chex.assert_trees_all_close(got, want, atol=1e-6)

  @parameterized.parameters(*_NAMES)
  @pytest.mark.slow
  def test_two_drawn_pairs(self, name):
    first, second = _drawn(name, 2)
    self._check_with_gradients(name, *first)
    self._check_logits(name, *second)
    self._check_neutral(name, second, _logits)

  @parameterized.parameters(*_ALL)
  @pytest.mark.slow
  def test_all_pairs(self, name, *pair):
    self._check_with_gradients(name, *pair)

    def without_own(model, params, *text):
      loss, grads, logits = _with_gradients(model, params, *text)
      for layer in range(_num_layers(name)):
        grads[f"layers_{layer}"]["attn"].pop(name, None)
      return loss, grads, logits

    self._check_neutral(name, pair, without_own)
    self._check_types(name, pair)

  def _check_types(self, name, pair):
    """Numbers in bfloat16; layers that are computed anew."""
    model, params, tokens = _model(_small(name), *pair, _num_layers(name))
    text = (tokens, _steps(tokens.shape))
    chex.assert_tree_all_finite(
        _with_gradients(model.clone(dtype=jnp.bfloat16), params, *text)
    )
    got, want = (
        _with_gradients(one, params, *text)
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

  def _check(self, name, num_kv_heads, positions, num_caches=2):
    """Prompts of several lengths, then single tokens; rows that end wait."""
    entry = _small(name)
    if isinstance(_system(name), hooks.SeesLater):
      entry = _system(name).neutral
    num_layers = _num_layers(name)
    model, params, tokens = _model(entry, num_kv_heads, positions, num_layers)
    want = _logits(model, params, tokens, _steps(tokens.shape))
    for cache in itertools.islice(self._caches(model), num_caches):
      at = np.array([_PROMPT, 1, 4], np.int32)
      padded = _steps((3, _PROMPT), at)
      prompt = np.where(padded < 0, 0, tokens[:, :_PROMPT])
      logits, cache = applied.step(model, params, prompt, padded, cache)
      logits = jax.device_get(logits)
      for row, length in enumerate(at):
        chex.assert_trees_all_close(
            logits[row, :length], want[row, :length], atol=1e-5
        )
      while (at < _LENGTH).any():
        active = at < _LENGTH
        one = tokens[np.arange(3), np.where(active, at, 0)][:, None]
        where = np.where(active, at, -1).astype(np.int32)[:, None]
        logits, cache = applied.step(model, params, one, where, cache)
        logits = jax.device_get(logits)
        for row in np.flatnonzero(active):
          chex.assert_trees_all_close(
              logits[row, 0], want[row, at[row]], atol=1e-5
          )
        at = at + active

  def test_no_two_arrays_of_a_new_layer_or_cache_are_one(self):
    """Else a step that writes in place would be given one twice."""
    for name in _NAMES:
      config = _config(_small(name), 2, "rotary", _num_layers(name))
      made = [full_cache.init(config, 3, _LENGTH)]
      for system in layer_hooks.of_layer(config, 0).systems:
        if isinstance(system, hooks.Parametric):
          made.append(system.init_params(jax.random.key(0), config, 0))
      places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(made)]
      self.assertLen({*places}, len(places), name)

  @parameterized.parameters(*_NAMES)
  @pytest.mark.slow
  def test_a_second_prompt_goes_on_from_the_first(self, name):
    """Of five tokens, then of six and of four, one row being shorter."""
    system = _system(name)
    sees_later = isinstance(system, hooks.SeesLater)
    entry = system.neutral if sees_later else _small(name)
    pair = _drawn(name, 1)[0]
    model, params, tokens = _model(entry, *pair, _num_layers(name))
    want = _logits(model, params, tokens, _steps(tokens.shape))
    cache = full_cache.init(model.config, 3, _LENGTH)
    first = _steps((3, 5))
    logits, cache = applied.step(model, params, tokens[:, :5], first, cache)
    chex.assert_trees_all_close(logits, want[:, :5], atol=1e-5)
    second = _steps((3, 6), (6, 4, 6))
    second = np.where(second < 0, -1, second + 5)
    logits, _ = applied.step(model, params, tokens[:, 5:11], second, cache)
    for row, length in enumerate((6, 4, 6)):
      chex.assert_trees_all_close(
          logits[row, :length], want[row, 5 : 5 + length], atol=1e-5
      )

  def _caches(self, model):
    """The cache that keeps everything, and slots where they can follow."""
    yield full_cache.init(model.config, 3, _LENGTH)
    slots = kv_cache.init(full.Full(), model.config, 3, _LENGTH)
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
    entries = [_small(name) for name in _NAMES[part::4]]
    layers = [_num_layers(name) for name in _NAMES[part::4]]
    found = eight_devices.differences([
        dict(attention=[entry], num_layers=num)
        for entry, num in zip(entries, layers, strict=True)
    ])
    for entry, error in zip(entries, found, strict=True):
      self.assertLess(error, 1e-6, entry)


if __name__ == "__main__":
  absltest.main()
