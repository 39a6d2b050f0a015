"""NAtS-L: forced routes, one pass by hand, gradients of routes, the cache."""

import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference import generate
from joma.systems.routers import nats_ways
from joma.transformer import attention
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import model as models
from kernels_pallas import masks
from kernels_pallas.gated_delta_rule import api
from scansnap_jax.experiment import errors
from tests import draws
from tests.joma.systems import one_layer
from tests.joma.transformer import applied

_CHUNK, _LENGTH = 3, 9
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": "0"}
)
_SILU = lambda x: x / (1 + np.exp(-x))
_SIGMOID = lambda x: 1 / (1 + np.exp(-x))


def _vectors():
  """Of four query heads, two key heads; two texts of nine tokens."""
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  wide = [draws.normal(i, 2, _LENGTH, 4, 8) for i in range(3)]
  narrow = [draws.normal(i, 2, _LENGTH, 2, 8) for i in (3, 4)]
  decay = -jnp.abs(draws.normal(5, 2, _LENGTH, 4))
  beta = jax.nn.sigmoid(draws.normal(6, 2, _LENGTH, 4))
  value = jnp.repeat(narrow[1], 2, axis=2)
  linear = (unit(wide[1]), unit(wide[2]), value, decay, beta)
  return nats_ways.Vectors(wide[0], wide[0], narrow[0], narrow[1], linear)


_OPTIONS = hooks.AttentionOptions(scale=8**-0.5, implementation="reference")


def _attention(found, is_seen):
  """What [T, S] keys of each head give, in NumPy."""
  key, value = (
      np.repeat(np.asarray(x), 2, axis=2) for x in (found.soft_key, found.value)
  )
  logits = np.einsum("BTNH,BSNH->BNTS", found.soft_query, key) * 8**-0.5
  weights = np.where(is_seen, np.exp(logits), 0)
  weights /= weights.sum(axis=-1, keepdims=True)
  return np.einsum("BNTS,BSNH->BTNH", weights, value)


class ForcedTest(absltest.TestCase):

  def test_kept_chunks_are_dense_attention(self):
    found, at = _vectors(), np.arange(_LENGTH)
    causal = at[None] <= at[:, None]
    own = causal & (at[None] // _CHUNK == at[:, None] // _CHUNK)
    for is_kept, is_seen in ((True, causal), (False, own)):
      routes = jnp.full((2, 3, 2), is_kept)
      for slope in (None, jnp.zeros((2, 3, 2))):
        with_options = lambda *x: nats_ways.attend(*x, _CHUNK, _OPTIONS)
        got = _jit(with_options)(found, routes, slope)
        want = _attention(found, is_seen)
        np.testing.assert_allclose(got, want, atol=1e-5)

  def test_folded_chunks_are_the_gated_delta_rule(self):
    found, lengths = _vectors(), jnp.array([9, 9])
    fold = _jit(
        lambda is_kept: nats_ways.fold(
            found, is_kept, jnp.zeros((2, 3, 2)), lengths, _CHUNK, _OPTIONS
        )
    )
    run = lambda is_kept: fold(jnp.full((2, 3, 2), is_kept))
    rule = _jit(
        lambda arrays: api.gated_delta_rule(
            *arrays, scale=8**-0.5, implementation="reference"
        )
    )
    want = rule(found.linear)
    out, state, inner = run(False)
    np.testing.assert_allclose(out, want.out, atol=1e-5)
    np.testing.assert_allclose(state, want.state, atol=1e-5)
    np.testing.assert_array_equal(inner, state)
    # What is kept is not in the state: each chunk reads itself alone.
    out, state, _ = run(True)
    np.testing.assert_array_equal(state, 0)
    for first in range(0, _LENGTH, _CHUNK):
      part = slice(first, first + _CHUNK)
      alone = rule([x[:, part] for x in found.linear])
      np.testing.assert_allclose(out[:, part], alone.out, atol=1e-5)

  def test_the_state_fades_over_what_is_kept(self):
    found = _vectors()
    is_kept = jnp.zeros((2, 3, 2), bool).at[:, 1].set(True)
    fold = lambda lengths: nats_ways.fold(
        found, is_kept, jnp.zeros((2, 3, 2)), lengths, _CHUNK, _OPTIONS
    )
    _, state, inner = _jit(fold)(jnp.array([6, 5]))
    rule = _jit(
        lambda arrays: api.gated_delta_rule(*arrays, implementation="reference")
    )
    first = rule([x[:, :_CHUNK] for x in found.linear]).state
    fade = np.exp(np.asarray(found.linear[3])[:, 3:6].sum(axis=1))
    want = fade[0][..., None, None] * np.asarray(first)[0]
    np.testing.assert_allclose(state[0], want, atol=1e-5)
    # The second text ends inside the chunk: it is in the state that grows.
    np.testing.assert_allclose(state[1], first[1], atol=1e-5)
    both = rule([x[1:, :5] for x in found.linear]).state
    np.testing.assert_allclose(inner[1], both[0], atol=1e-5)


def _by_hand(params, x):
  """Heads' outputs of one text [T, D], in float64, and routes [C, K]."""
  own = {name: np.float64(leaf) for name, leaf in params["nats"].items()}
  x, made = np.float64(x), {}
  for name in ("query", "key", "value"):
    rows = np.einsum("TD,DNH->TNH", x, np.float64(params[name]["kernel"]))
    made[name] = np.zeros_like(rows)
    for u, kernel in enumerate(own[name]):
      made[name][u:] += kernel * rows[: len(rows) - u]
    made[name] = _SILU(made[name])
  query, key, value = (made[name] for name in ("query", "key", "value"))
  length, size = len(x), query.shape[-1]
  norm = (
      lambda x, scale: x
      * scale
      / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)
  )
  unit = lambda x: x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6)
  heads = lambda x: np.repeat(x, 2, axis=1)
  soft_query = norm(query, own["soft_query"])
  soft_key, wide = heads(norm(key, own["soft_key"])), heads(value)
  is_kept = []
  for first in range(0, length - _CHUNK + 1, _CHUNK):
    mean = x[first : first + _CHUNK].mean(axis=0)
    logits = np.einsum("D,DKI->KI", mean, own["route"])
    is_kept.append(logits[:, 0] >= logits[:, 1])
  is_kept = np.array(is_kept)
  inner = x @ own["decay"] + own["decay_bias"]
  decay = np.exp(-np.exp(own["decay_log"]) * np.log1p(np.exp(inner)))
  beta = _SIGMOID(x @ own["beta"])
  opening = _SILU(np.einsum("TD,DNH->TNH", x, own["gate"]))
  state = np.zeros((4, size, size))
  held, out = state.copy(), np.zeros((length, 4, size))
  for t in range(length):
    chunk = t // _CHUNK
    if t and not t % _CHUNK:  # What was before is kept or folded in.
      fade = decay[t - _CHUNK : t].prod(axis=0)[:, None, None] * held
      kept = np.repeat(is_kept[chunk - 1], 2)[:, None, None]
      state = held = np.where(kept, fade, state)
    seen = [
        [s // _CHUNK == chunk or is_kept[s // _CHUNK, n // 2] for n in range(4)]
        for s in range(t + 1)
    ]
    logits = np.einsum("NH,SNH->SN", soft_query[t], soft_key[: t + 1])
    weights = np.where(seen, np.exp(logits * size**-0.5), 0)
    weights /= weights.sum(axis=0)
    soft = np.einsum("SN,SNH->NH", weights, wide[: t + 1])
    at = heads(unit(key))[t]
    state = decay[t][:, None, None] * state
    missing = wide[t] - np.einsum("NHJ,NH->NJ", state, at)
    state = state + beta[t][:, None, None] * at[..., None] * missing[:, None]
    linear = np.einsum("NHJ,NH->NJ", state, unit(query)[t]) * size**-0.5
    share = np.exp(np.einsum("NH,NHI->NI", query[t], own["mix"]))
    share /= share.sum(axis=-1, keepdims=True)
    both = (norm(soft, own["soft"]), norm(linear, own["scale"]))
    mixed = share[:, :1] * both[0] + share[:, 1:] * both[1]
    out[t] = mixed * opening[t]
  return out, is_kept


class LayerTest(parameterized.TestCase):

  def test_one_pass_is_that_by_hand(self):
    config, params, x = one_layer.draw(f"nats:chunk={_CHUNK}", length=11)
    got, kept = one_layer.head_out(config, params, x), []
    for row in range(2):
      want, is_kept = _by_hand(params, x[row])
      np.testing.assert_allclose(got[row], want, atol=2e-5)
      kept.append(is_kept)
    self.assertEqual(set(np.ravel(kept)), {True, False})

  def test_what_was_not_chosen_has_no_gradient(self):
    found, lengths = _vectors(), jnp.array([9, 9])
    is_kept = jnp.array([[True, False], [False, True], [True, True]])[None]
    is_kept = jnp.broadcast_to(is_kept, (2, 3, 2))
    weigh = draws.normal(9, 2, _LENGTH, 4, 8)
    soft = lambda slope: nats_ways.attend(
        found, is_kept, slope, _CHUNK, _OPTIONS
    )
    linear = lambda slope: nats_ways.fold(
        found, is_kept, slope, lengths, _CHUNK, _OPTIONS
    )[0]
    zero = jnp.zeros((2, 3, 2))
    slope_of = lambda read: np.asarray(
        _jit(jax.grad(lambda x: (weigh * read(x)).sum()))(zero)
    )
    by_soft, by_linear = slope_of(soft), slope_of(linear)
    before = np.arange(3)[None, :, None] < 2  # The last is read by nobody.
    kept = np.asarray(is_kept)
    np.testing.assert_array_equal(by_soft != 0, kept & before)
    np.testing.assert_array_equal(by_linear != 0, ~kept & before)
    # A chunk that weighs e^eps as much.
    moved = lambda eps: float((weigh * soft(zero.at[0, 0, 0].set(eps))).sum())
    want = (moved(1e-2) - moved(-1e-2)) / 2e-2
    np.testing.assert_allclose(by_soft[0, 0, 0], want, rtol=2e-2)

  @parameterized.parameters(
      ("nats:chunk=0", "nats: chunk must be at least 1, got 0"),
      ("nats:slots=-1", "nats: slots must be at least 0"),
      ("nats:force=full", "force='full' must be one of"),
  )
  def test_says_what_would_be_right(self, entry, message):
    with self.assertRaisesRegex(errors.UserError, message):
      one_layer.draw(entry)


class CacheTest(parameterized.TestCase):

  def _run(self, config, params, x, parts):
    """Caches and outputs after parts of such lengths."""
    module = attention.Attention(config, 0, implementation="reference")
    cache = full_cache.init(config, len(x), x.shape[1])[0]
    run = _jit(
        lambda x, at, cache: module.apply(
            {"params": params}, x, at, masks.causal(x.shape[1]), cache
        )[:2]
    )
    outs, caches, first = [], [cache], 0
    for length in parts:
      part = slice(first, first + length)
      at = jnp.broadcast_to(jnp.arange(first, first + length), (2, length))
      out, cache = run(x[:, part], at, cache)
      outs.append(np.asarray(out))
      caches.append(cache)
      first += length
    return np.concatenate(outs, axis=1), caches

  @pytest.mark.slow
  def test_kept_keys_are_chunks_times_those_of_the_soft_way(self):
    config, params, x = one_layer.draw(f"nats:chunk={_CHUNK}", length=11)
    _, caches = self._run(config, params, x, (7, 1, 1, 1, 1))
    expected = [_by_hand(params, x[row])[1] for row in range(2)]
    shapes = lambda tree: [leaf.shape for leaf in jax.tree.leaves(tree)]
    for length, cache in zip((7, 8, 9, 10, 11), caches[1:], strict=True):
      whole = length // _CHUNK
      want = [is_kept[:whole].sum(axis=0) for is_kept in expected]
      np.testing.assert_array_equal(cache.num_kept, want)
      self.assertEqual(shapes(cache), shapes(caches[0]))
      # Slots that are filled have keys; those behind them have none.
      kept = np.asarray(cache.key[:, :, : cache.num_slots * _CHUNK])
      filled = (np.abs(kept).max(axis=-1) > 0).sum(axis=-1)
      np.testing.assert_array_equal(filled, _CHUNK * np.array(want))
    # The same from a prompt as from tokens, to the last digits of sums.
    _, again = self._run(config, params, x, (1,) * 11)
    leaves = lambda cache: jax.tree.leaves(cache)
    whole = caches[-1].num_slots * _CHUNK + 11 % _CHUNK
    cut = lambda cache: dataclasses.replace(
        cache, key=cache.key[:, :, :whole], value=cache.value[:, :, :whole]
    )
    for one, two in zip(
        leaves(cut(caches[-1])), leaves(cut(again[-1])), strict=True
    ):
      np.testing.assert_allclose(one, two, atol=1e-5)

  @parameterized.parameters(((9,),), ((1,) * 9,), ((4, 1, 1, 1, 1, 1),))
  @pytest.mark.slow
  def test_a_chunk_without_a_slot_is_told(self, parts):
    entry = f"nats:chunk={_CHUNK}:force=soft:slots=1"
    config, params, x = one_layer.draw(entry)
    out, caches = self._run(config, params, x, parts)
    self.assertRegex(caches[-1].overflow(), "kept 1 chunks of 3.*, and 2 more")
    self.assertRegex(caches[-1].overflow(), "slots=3 or more")
    self.assertIsNone(caches[0].overflow())
    self.assertTrue(np.isnan(out[:, -1]).all())
    if len(parts) > 1:  # The first chunk has a slot.
      self.assertFalse(np.isnan(out[:, :5]).any())

  @pytest.mark.slow
  def test_generation_ends_with_the_number(self):
    config = dataclasses.replace(
        one_layer.CONFIG,
        vocab_size=7,
        attention=("nats:chunk=2:force=soft:slots=1",),
    )
    model = models.Transformer(config, implementation="reference")
    steps = generate.stream(
        model, applied.params(model), [[1, 2, 3]], max_new_tokens=4
    )
    with self.assertRaisesRegex(errors.UserError, "Layer 0: nats.* 1 more"):
      list(steps)


if __name__ == "__main__":
  absltest.main()
