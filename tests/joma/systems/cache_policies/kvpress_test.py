"""Scores and kept sets beside kvpress, on the same weights and tokens."""

import dataclasses
import functools
import sys
import tempfile
import types
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import prompts
from joma.inference.cache import rehearsal
from joma.inference.cache import tokens
from joma.systems.cache_policies.by_attention import compactor
from joma.systems.cache_policies.by_attention import finch
from joma.systems.cache_policies.by_attention import h2o
from joma.systems.cache_policies.by_attention import kvzip
from joma.systems.cache_policies.by_attention import simlayerkv
from joma.systems.cache_policies.by_attention import snapkv
from joma.systems.cache_policies.by_attention import tova
from joma.systems.cache_policies.by_key import cur
from joma.systems.cache_policies.by_key import expected_attention
from joma.systems.cache_policies.by_key import keydiff
from joma.systems.cache_policies.by_key import knorm
from joma.systems.cache_policies.by_key import lagkv
from joma.systems.cache_policies.by_place import window
from joma.systems.cache_policies.own_cache import think
from joma.systems.cache_policies.wrapping import cam
from joma.systems.cache_policies.wrapping import composed
from joma.systems.cache_policies.wrapping import criticalkv
from joma.systems.cache_policies.wrapping import dms
from joma.transformer import model as models
from joma.transformer.hf import pretrained

kvpress = pytest.importorskip(
    "kvpress", reason="kvpress is not installed: see the extra bench"
)

# float32 of two programs, seven digits less what sums over 132 tokens cost.
_TOLERANCE = 1e-5
_LENGTH, _LAG, _KEPT = 132, 16, 76
_ALWAYS = 1e20


@functools.cache
def _models():
  """A random Llama, the same for both: 8 query heads, 2 key heads."""
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.LlamaConfig(
      vocab_size=_LENGTH,
      hidden_size=64,
      intermediate_size=96,
      num_hidden_layers=3,
      num_attention_heads=8,
      num_key_value_heads=2,
      max_position_embeddings=1024,
      attn_implementation="eager",
  )
  peer = transformers.LlamaForCausalLM(config).eval()
  with tempfile.TemporaryDirectory() as folder:
    peer.save_pretrained(folder)
    loaded = pretrained.load(folder)
  return peer, loaded


def _tokens():
  """Each once: the same token twice has keys of the same length."""
  rng = np.random.default_rng(0)
  return np.stack([rng.permutation(_LENGTH) for _ in range(2)])


def _peer_scores(press, mask=None):
  """What kvpress scores, [L B K T], from within its own forward pass."""
  import torch

  found, score = [], press.score

  def record(*args, **kwargs):
    found.append(score(*args, **kwargs))
    return found[-1]

  press.score = record
  peer, _ = _models()
  with torch.no_grad(), press(peer):
    peer(
        torch.tensor(_tokens()),
        attention_mask=None if mask is None else torch.tensor(mask),
        use_cache=True,
        past_key_values=None,
    )
  return np.stack([x.float().numpy() for x in found])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Recorder:
  """A KV cache that attends to all and keeps what a policy scores."""

  policy: policy_lib.Policy = dataclasses.field(metadata={"static": True})
  layer: int = dataclasses.field(metadata={"static": True})
  score: jax.Array | None = None

  def attend(self, query, key, value, positions, rotate, options):
    new = tokens.Tokens(query, key, value, positions, rotate, options)
    result, prompt = prompts.read(
        new, self.policy, layer=self.layer, capacity=0, is_raw=False
    )
    score, aux, state = calls.read_prompt(self.policy, prompt)
    pos = jnp.broadcast_to(positions[:, None], score.shape)
    slots = policy_lib.Slots(
        prompt.key.swapaxes(1, 2), value.swapaxes(1, 2), score, pos, aux, state
    )
    priority = calls.priority(self.policy, slots, prompt.lengths)
    return result.out, dataclasses.replace(self, score=priority)


def _our_scores(policy):
  _, (config, params) = _models()
  model = models.Transformer(config, implementation="reference")
  sized = policy.with_capacity(_KEPT)
  caches = tuple(_Recorder(sized, n) for n in range(config.num_layers))
  _, caches = model.apply(
      {"params": params}, jnp.asarray(_tokens()), kv_cache=caches
  )
  return np.stack([cache.score for cache in caches])


def _our_kept(policy):
  _, (config, params) = _models()
  model = models.Transformer(config, implementation="reference")
  caches = kv_cache.init(policy, config, 2, _KEPT)
  _, caches = model.apply(
      {"params": params}, jnp.asarray(_tokens()), kv_cache=caches
  )
  return np.stack([np.sort(cache.pos, axis=-1) for cache in caches])


def _cases():
  """Press, our policy, our score over theirs, and who is scored by both."""
  everyone = slice(None)
  half = dict(compression_ratio=1 - _KEPT / _LENGTH - 1e-9)
  return {
      "knorm": (
          kvpress.KnormPress(**half),
          knorm.Knorm(num_recent=0),
          1,
          everyone,
      ),
      "keydiff": (
          kvpress.KeyDiffPress(**half),
          keydiff.KeyDiff(num_recent=0),
          1,
          everyone,
      ),
      # They keep the last token, which the paper's rule may drop.
      "tova": (
          kvpress.TOVAPress(**half),
          tova.TOVA(num_recent=1),
          1,
          slice(0, -1),
      ),
      "snapkv": (
          kvpress.SnapKVPress(window_size=32, kernel_size=5, **half),
          snapkv.SnapKV(window=32, kernel_size=5),
          1,
          slice(0, -32),
      ),
      "expected_attention": (
          kvpress.ExpectedAttentionPress(n_future_positions=64, **half),
          expected_attention.ExpectedAttention(num_future=64),
          1,
          slice(4, None),
      ),
      "lagkv": (
          kvpress.LagKVPress(lag_size=_LAG, **half),
          lagkv.LagKV(lag_size=_LAG),
          1,
          everyone,
      ),
      # Scores differ by a factor a head: LeverageTest.
      "cur": (
          kvpress.CURPress(num_sinks=4, **half),
          cur.CUR(num_sinks=4),
          None,
          everyone,
      ),
      # A mean over queries and no window, where H2O has a sum and one.
      "observed_attention": (
          kvpress.ObservedAttentionPress(**half),
          h2o.H2O(score="mean", num_recent=0),
          4,
          everyone,
      ),
      # Theirs is a mean over the group's queries, epsilon added to it.
      "criticalkv": (
          kvpress.CriticalKVPress(kvpress.ObservedAttentionPress(**half)),
          criticalkv.CriticalKV(
              base=h2o.H2O(score="mean", num_recent=0), epsilon=4e-4
          ),
          4,
          everyone,
      ),
      # Half of all slots, 38, go by attention, the window's 32 among them;
      # the paper's half is of those that the window leaves: 22, not 6.
      "criticalkv_of_a_window": (
          kvpress.CriticalKVPress(
              kvpress.SnapKVPress(window_size=32, kernel_size=5, **half)
          ),
          criticalkv.CriticalKV(
              base=snapkv.SnapKV(window=32, kernel_size=5),
              first_share=6.5 / 44,
          ),
          1,
          slice(0, -32),
      ),
      "streaming_llm": (
          kvpress.StreamingLLMPress(n_sink=4, **half),
          window.StreamingLLM(num_sinks=4),
          None,
          everyone,
      ),
  }


class KvpressTest(parameterized.TestCase):

  @parameterized.parameters(*_cases())
  def test_scores_and_kept_tokens_are_the_same(self, name):
    press, policy, factor, scored = _cases()[name]
    theirs = _peer_scores(press)
    if factor is not None:  # Theirs of StreamingLLM are 1 and 0.
      # What they keep whatever it scores has the largest float.
      want = factor * np.minimum(theirs, 10 * _ALWAYS)[..., scored]
      got = _our_scores(policy)[..., scored]
      is_first = want > _ALWAYS
      np.testing.assert_array_equal(got > _ALWAYS, is_first)
      want, got = np.where(is_first, 0, want), np.where(is_first, 0, got)
      error = np.abs(got - want).max() / np.abs(want).max()
      self.assertLess(error, _TOLERANCE)
    order = np.argsort(-theirs, axis=-1, kind="stable")
    kept = np.sort(order[..., :_KEPT], axis=-1)
    np.testing.assert_array_equal(_our_kept(policy), kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LastWeights(policy_lib.Policy):
  """The weights of a prompt's last query, mean over a group."""

  def read_prompt(self, prompt):
    weights, _ = prompt.last_weights(1)
    return weights[..., 0, :].mean(axis=2), None, None


class LazyLayersTest(absltest.TestCase):

  def test_the_same_share_but_for_the_last_token_itself(self):
    """Theirs is of the recent tokens before the last one; the paper's with it.

    Each text alone: they judge the mean of a batch, the paper each text.
    """
    weights = _our_scores(_LastWeights()).mean(axis=2)
    sinks, recent = 4, 16
    policy = simlayerkv.SimLayerKV(num_sinks=sinks, num_recent=recent - 1)
    _, (config, params) = _models()
    _, caches = models.Transformer(config, implementation="reference").apply(
        {"params": params},
        jnp.asarray(_tokens()),
        kv_cache=kv_cache.init(policy, config, 2, _LENGTH),
    )
    near = weights[..., :sinks].sum(-1) + weights[..., -recent:].sum(-1)
    got = np.stack([cache.state for cache in caches])
    np.testing.assert_allclose(got, near, rtol=_TOLERANCE)
    theirs = near - weights[..., -1] + weights[..., -recent - 1]
    for row, text in enumerate(_tokens()):
      for layer, share in enumerate(theirs[:, row]):
        for threshold, is_lazy in (share - 1e-5, True), (share + 1e-5, False):
          press = kvpress.SimLayerKVPress(threshold, 1, recent, sinks)
          kept = _peer_lengths(press, text)[layer]
          want = sinks + recent - 1 if is_lazy else _LENGTH
          self.assertEqual(kept, want, (row, layer))


def _peer_lengths(press, text):
  """Tokens that each layer of theirs keeps of a text."""
  import torch

  peer, _ = _models()
  with torch.no_grad(), press(peer):
    found = peer(torch.tensor(text)[None], use_cache=True)
  return [layer.keys.shape[2] for layer in found.past_key_values.layers]


class CompactorTest(absltest.TestCase):

  def test_scores_and_kept_tokens_are_the_same(self):
    """Each text alone, in whole chunks, by the same directions, unscaled.

    They bring scores to one deviation over a batch, and let the padding of a
    last chunk attend and be attended to; the logits of both have no scale.
    """
    press = kvpress.CompactorPress(
        compression_ratio=1 - _KEPT / _LENGTH - 1e-9,
        chunk_size=24,
        sketch_dimension=6,
    )
    policy = compactor.Compactor(
        chunk_size=24, sketch_size=6, is_scaled=False, num_recent=4
    )
    kept, whole = _our_kept(policy), _tokens()
    for row, text in enumerate(whole):
      with mock.patch.object(
          sys.modules[__name__], "_tokens", lambda text=text: text[None]
      ):
        with mock.patch("torch.randn", side_effect=_Directions(policy)):
          theirs = _peer_scores(press)
        got = _our_scores(policy)[..., 8:-4]
      want = theirs[..., 8:-4]
      error = np.abs(got - want).max() / np.abs(want).max()
      self.assertLess(error, _TOLERANCE)
      order = np.argsort(-theirs[:, 0], axis=-1, kind="stable")
      theirs = np.sort(order[..., :_KEPT], axis=-1)
      np.testing.assert_array_equal(kept[:, row], theirs)


class _Directions:
  """Ours in place of their draws, layer by layer."""

  def __init__(self, policy):
    self.policy, self.layer = policy, 0

  def __call__(self, batch, heads, head_dim, size, **kwargs):
    import torch

    drawn = compactor.directions(self.policy, self.layer, heads, head_dim)
    self.layer += 1
    return torch.tensor(np.asarray(drawn) * size**0.5)[None]


class MergingTest(absltest.TestCase):

  def test_values_are_handed_on_alike(self):
    """One head, for they let all heads of a layer lose the same tokens.

    The draws are ours. They merge as many tokens as there were steps since the
    last cut, all here.
    """
    import torch

    draws = np.random.default_rng(0)
    shape, kept, merged = (2, 1, 40, 8), 24, 5
    key, value = (draws.standard_normal(shape, np.float32) for _ in range(2))
    score = draws.random(shape[:3], np.float32)
    policy = cam.CaM(base=h2o.H2O(num_recent=0), num_merged=merged)
    policy = policy.with_capacity(kept)
    every = jnp.broadcast_to(jnp.arange(40), shape[:3])
    slots = policy_lib.Slots(
        *map(jnp.asarray, (key, value, score)), pos=every, aux=(None, None)
    )
    lengths = jnp.full(2, 40)
    index = prompts.best(policy, slots, lengths, kept)
    got = prompts.merged(policy, slots, index, lengths)
    got = jnp.take_along_axis(got, index[..., None], axis=2)
    press = kvpress.CAMPress(
        base_press=kvpress.KnormPress(), target_size=kept, merge_budget=merged
    )
    tensor = lambda x: torch.tensor(np.array(x))
    press.base_press.score = lambda *args: tensor(score)
    press.layer_step_counts[0] = 40 - kept
    press._running_attn_sum[0] = tensor(score)
    drawn = np.asarray(policy._draws(every, 0))
    leaving = np.argsort(score, axis=-1)[..., : 40 - kept]
    ours = np.take_along_axis(drawn, np.sort(leaving), axis=-1)
    bernoulli = lambda chance: (tensor(ours) < chance).float()
    module = types.SimpleNamespace(layer_idx=0)
    with mock.patch.object(torch, "bernoulli", bernoulli):
      _, want = press.compress(
          module, None, tensor(key), tensor(value), tensor(score), {}
      )
    np.testing.assert_allclose(got, want.numpy(), atol=_TOLERANCE)
    stay = np.take_along_axis(value, np.asarray(index)[..., None], axis=2)
    self.assertGreater(float(np.abs(got - stay).max()), 0.1)


class ChannelsTest(absltest.TestCase):

  def test_the_same_channels_are_left_out(self):
    """They zero those of all tokens; the paper's last ones stay whole."""
    import torch

    peer, (config, params) = _models()
    press = kvpress.ThinKPress(key_channel_compression_ratio=0.5)
    with torch.no_grad(), press(peer):
      found = peer(torch.tensor(_tokens()), use_cache=True)
    policy = think.ThinK(kept=0.5, num_exact=32)
    _, caches = models.Transformer(config, implementation="reference").apply(
        {"params": params},
        jnp.asarray(_tokens()),
        kv_cache=kv_cache.init(policy, config, 2, 160),
    )
    for cache, layer in zip(caches, found.past_key_values.layers, strict=True):
      keys = layer.keys.numpy()
      stay = np.argsort((keys == 0).all(axis=2), kind="stable")[..., :4]
      np.testing.assert_array_equal(cache.channels, np.sort(stay))
      theirs = np.take_along_axis(keys, stay[:, :, None], axis=-1)
      ours = cache.key.reshape(*cache.key.shape[:2], -1, 4)
      np.testing.assert_allclose(
          ours[:, :, :128], theirs[:, :, :128], atol=_TOLERANCE
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Theirs(finch.Finch):
  """FINCH, whose queries count with one token less, as theirs do."""

  def read_prompt(self, prompt):
    weights, rows = prompt.last_weights(self.window)
    before = jnp.maximum(rows, 0)[:, None, None, :, None]
    return (weights * before).mean(axis=(2, 3)), None, None


class QuestionTest(absltest.TestCase):

  def test_scores_are_theirs_but_for_the_token_that_asks(self):
    """Their factor of a query is its place from 0, the paper's from 1.

    Their window is set by a delimiter in the prompt, by hand here.
    """
    press = kvpress.FinchPress(compression_ratio=1 - _KEPT / _LENGTH - 1e-9)
    press.window_size, press.delimiter_token_id = 32, -1
    press.rerotate_keys = False
    theirs = _peer_scores(press)[..., :-32]
    for policy, is_close in (
        (_Theirs(window=32), True),
        (finch.Finch(window=32), False),
    ):
      ours = _our_scores(policy)[..., :-32]
      error = np.abs(ours - theirs).max() / theirs.max()
      self.assertEqual(bool(error < _TOLERANCE), is_close, error)
    order = np.argsort(-theirs, axis=-1, kind="stable")[..., : _KEPT - 32]
    kept = _our_kept(_Theirs(window=32))[..., : _KEPT - 32]
    np.testing.assert_array_equal(kept, np.sort(order, axis=-1))
    # One in a hundred: hardly any token changes its place.
    of_paper = _our_kept(finch.Finch(window=32))[..., : _KEPT - 32]
    same = np.mean([
        np.isin(a, b).mean()
        for a, b in zip(
            of_paper.reshape(-1, _KEPT - 32),
            kept.reshape(-1, _KEPT - 32),
            strict=True,
        )
    ])
    self.assertGreater(same, 0.95)


class ThresholdTest(absltest.TestCase):

  def test_the_same_tokens_are_below_a_threshold(self):
    """Their keys are masked, ours leave; a window of 8 stays in both."""
    import torch

    peer, (config, params) = _models()
    theirs = _peer_scores(kvpress.KnormPress(0.5))
    middle = np.sort(theirs, axis=None)[theirs.size // 2 :][:9]
    widest = np.diff(middle).argmax()  # No score lies at the threshold.
    threshold = float(middle[widest : widest + 2].mean())
    press = kvpress.DMSPress(
        kvpress.KnormPress(), threshold=threshold, sliding_window_size=8
    )
    masked = []
    for layer in peer.model.layers:  # Attention, once patched, does so itself.
      layer.self_attn.masked_key_indices = None
    with torch.no_grad(), press(peer):
      peer(torch.tensor(_tokens()), use_cache=True)
      for layer in peer.model.layers:
        masked.append(layer.self_attn.masked_key_indices)
    policy = dms.DMS(base=knorm.Knorm(num_recent=8), threshold=threshold)
    _, caches = models.Transformer(config, implementation="reference").apply(
        {"params": params},
        jnp.asarray(_tokens()),
        kv_cache=kv_cache.init(policy, config, 2, _LENGTH),
    )
    for where, cache in zip(masked, caches, strict=True):
      gone = np.zeros((2, 2, _LENGTH), bool)
      gone[tuple(np.asarray(x) for x in where)] = True
      for b in range(2):
        for k in range(2):
          kept = {int(p) for p in cache.pos[b, k] if p >= 0}
          self.assertEqual(kept, set(np.flatnonzero(~gone[b, k]).tolist()))


class RepetitionTest(absltest.TestCase):

  def test_the_greatest_weight_of_a_query_that_repeats_is_the_same(self):
    """Theirs ranks the heads of all layers together and never drops sinks.

    Ours keeps as many a head. Request and what ends it are one run of ids here.
    """
    import torch
    import transformers

    request, text = [7, 3, 11, 5], _tokens()[:1]
    ids = {"": [], "\n": request[3:]}
    tokenizer = types.SimpleNamespace(
        chat_template=None,
        encode=lambda said, **_: torch.tensor(
            [ids.get(said, request[:3])]
        ).long(),
    )
    peer, (config, params) = _models()
    press, found = kvpress.KVzipPress(0.5), []
    with (
        mock.patch.object(
            transformers.AutoTokenizer,
            "from_pretrained",
            return_value=tokenizer,
        ),
        mock.patch.object(
            press,
            "compress_post",
            lambda _: found.append(press.score_val.clone()),
        ),
        torch.no_grad(),
        press(peer),
    ):
      peer.model(
          input_ids=torch.tensor(text),
          past_key_values=transformers.DynamicCache(),
      )
    (theirs,) = (score.numpy() for score in found)
    lengths = jnp.array([_LENGTH])
    caches = kv_cache.init(kvzip.KVzip(), config, 1, _LENGTH)
    rows, _ = rehearsal.repeat(jnp.asarray(text), lengths, request)
    _, caches = models.Transformer(config, implementation="reference").apply(
        {"params": params},
        rows,
        positions=jnp.arange(rows.shape[1])[None],
        kv_cache=rehearsal.prepare(caches, lengths),
    )
    for score, cache in zip(theirs, caches, strict=True):
      places = np.argsort(cache.pos, axis=-1)
      ours = np.take_along_axis(np.asarray(cache.score), places, axis=-1)
      np.testing.assert_allclose(ours, score, atol=_TOLERANCE)
      half = lambda x: np.sort(np.argsort(-x, axis=-1)[..., : _LENGTH // 2])
      np.testing.assert_array_equal(half(ours), half(score))


class TwoStagesTest(absltest.TestCase):

  def test_two_presses_one_after_the_other_keep_the_same(self):
    import torch

    peer, _ = _models()
    wide, kept = 100, 60
    press = kvpress.ComposedPress([
        kvpress.KeyDiffPress(1 - wide / _LENGTH - 1e-9),
        kvpress.KnormPress(1 - kept / wide - 1e-9),
    ])
    with torch.no_grad(), press(peer):
      found = peer(torch.tensor(_tokens()), use_cache=True)
    policy = composed.Composed(
        first=keydiff.KeyDiff(num_recent=0),
        base=knorm.Knorm(num_recent=0),
        wide=wide / kept,
    )
    _, (config, params) = _models()
    _, caches = models.Transformer(config, implementation="reference").apply(
        {"params": params},
        jnp.asarray(_tokens()),
        kv_cache=kv_cache.init(policy, config, 2, kept),
    )
    for cache, layer in zip(caches, found.past_key_values.layers, strict=True):
      norms = lambda keys: np.sort(np.linalg.norm(np.asarray(keys), axis=-1))
      np.testing.assert_allclose(
          norms(cache.key.data), norms(layer.keys), rtol=1e-5
      )


class LeverageTest(absltest.TestCase):

  def test_scores_are_theirs_but_for_a_factor_a_head(self):
    """Theirs are divided by their sum; of sinks they are 1."""
    ours, theirs = _our_scores(cur.CUR()), _peer_scores(kvpress.CURPress(0.5))
    ours = (ours / ours.sum(axis=-1, keepdims=True))[..., 4:]
    error = np.abs(ours - theirs[..., 4:]).max() / ours.max()
    self.assertLess(error, _TOLERANCE)


class PaddingTest(parameterized.TestCase):

  def test_they_keep_padding_and_we_do_not(self):
    mask = np.ones((2, _LENGTH), int)
    mask[1, :40] = 0  # They pad on the left.
    theirs = _peer_scores(kvpress.KnormPress(0.5), mask)
    kept = np.argsort(-theirs, axis=-1)[:, 1, :, : _LENGTH // 2]
    self.assertGreater((kept < 40).sum(), 0)
    _, (config, params) = _models()
    steps = np.arange(_LENGTH)[None]
    positions = np.where(steps < np.array([[_LENGTH], [92]]), steps, -1)
    caches = kv_cache.init(knorm.Knorm(), config, 2, 66)
    _, caches = models.Transformer(config, implementation="reference").apply(
        {"params": params},
        jnp.asarray(_tokens()),
        positions=jnp.asarray(positions),
        kv_cache=caches,
    )
    for cache in caches:
      self.assertLess(int(cache.pos[1].max()), 92)
      self.assertGreaterEqual(int(cache.pos[1].min()), 0)
