"""Tests of the inspection of one model on one text."""

import dataclasses
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from joma.transformer import config as configs
from joma.transformer import inspection
from joma.transformer import model as models
from joma.transformer import probes
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

_CONFIG = configs.TransformerConfig(
    vocab_size=7,
    num_layers=2,
    embed_dim=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    hidden_dim=12,
    max_len=8,
    windows=(3, 0),
)
_IDS = np.array([[1, 2, 3, 4, 5], [6, 0, 1, 0, 2]])
# Ten times the rounding of float32 logits and sums of this size.
_ATOL = 1e-5


def _params():
  return applied.params(models.Transformer(_CONFIG))


class CutTest(absltest.TestCase):

  def test_every_token_is_in_one_window_of_its_text(self):
    self.assertEqual(
        inspection.cut((2, 5), 3),
        [(0, 0, 3), (0, 3, 5), (1, 0, 3), (1, 3, 5)],
    )
    self.assertEqual(inspection.cut((1, 4), 4), [(0, 0, 4)])


class CheckIdsTest(parameterized.TestCase):

  @parameterized.parameters(
      ([[0, 7]], r"Token 7 at \[0, 1\] is none of the model's.*\[0, 7\)"),
      ([[0, 1], [-1, 2]], r"Token -1 at \[1, 0\]"),
      (np.zeros((2, 0), int), r"no token to read: ids are \(2, 0\)"),
  )
  def test_tokens_that_the_model_lacks_are_refused(self, ids, message):
    with self.assertRaisesRegex(errors.UserError, message):
      inspection.check_ids(np.array(ids), _CONFIG)


class MeasureTest(absltest.TestCase):

  def test_windows_count_each_token_once_and_give_its_logits(self):
    params = _params()
    logits = np.full((2, 5, 7), np.nan, np.float32)

    def write(row, start, values):
      logits[row, start : start + len(values)] = values

    progress = []
    # Four windows, three at a time: the second call is filled up.
    with mock.patch.object(inspection, "_CALL_SIZE", 3 * 21):
      found = inspection.measure(
          _CONFIG,
          params,
          _IDS,
          3,
          write_logits=write,
          on_progress=progress.append,
      )
    self.assertEqual(progress, [3, 1])
    self.assertEqual(found["num_tokens"], 10)
    self.assertEqual(found["num_targets"], 2 * 2 + 2 * 1)
    model = models.Transformer(_CONFIG)
    apply = jax.jit(
        lambda ids: model.apply(
            {"params": params}, ids, mutable="intermediates"
        )
    )
    loss, entropy = 0.0, 0.0
    for start, stop in ((0, 3), (3, 5)):
      ids = _IDS[:, start:stop]
      # The mask is causal: what follows the window changes nothing in it.
      padded = np.pad(ids, ((0, 0), (0, 3 - ids.shape[1])))
      expected, seen = apply(jnp.asarray(padded))
      length = stop - start
      expected = np.asarray(expected)[:, :length]
      np.testing.assert_allclose(logits[:, start:stop], expected, atol=_ATOL)
      log_probs = np.asarray(jax.nn.log_softmax(expected), np.float64)
      for row in range(2):
        for t in range(length - 1):
          loss -= log_probs[row, t, ids[row, t + 1]]
      sown = seen["intermediates"]["layers_1"]["attn"]["attn_weights"][0]
      weights = np.asarray(sown, np.float64)[:, :, :length]
      entropy -= (weights * np.log(np.where(weights > 0, weights, 1))).sum(
          axis=(0, 2, 3)
      )
    self.assertAlmostEqual(found["loss"], loss / 6, delta=_ATOL)
    self.assertAlmostEqual(found["perplexity"], np.exp(loss / 6), delta=1e-3)
    np.testing.assert_allclose(found["entropy"][1], entropy / 10, atol=_ATOL)
    # Windows of 3 and 2 tokens: one, two, three keys, and one, two.
    uniform = (2 * np.log(2) + np.log(3)) / 5
    np.testing.assert_allclose(
        found["uniform"]["entropy"], [uniform, uniform], atol=_ATOL
    )
    self.assertEqual(np.shape(found["sink_rate"]), (2,))
    self.assertEqual(sorted(found["stable_rank"]), ["down", "gate", "up"])

  @pytest.mark.slow
  def test_lengths_share_programs(self):
    """Texts of 3 to 8 tokens, alone and cut into windows that few fill."""
    before = probes.read._cache_size()
    ids = np.arange(8)[None] % 7
    found = [
        inspection.measure(_CONFIG, _params(), ids[:, :length], length)
        for length in (3, 5, 8)
    ]
    self.assertEqual(probes.read._cache_size() - before, 1)
    for length, one in zip((3, 5, 8), found, strict=True):
      self.assertEqual((one["num_tokens"], one["num_windows"]), (length, 1))
      logits = models.Transformer(_CONFIG).apply(
          {"params": _params()}, jnp.asarray(ids[:, :length])
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(
          logits[0, :-1], ids[0, 1:length]
      )
      np.testing.assert_allclose(one["loss"], losses.mean(), atol=_ATOL)
    for length in (5, 6, 8):
      inspection.measure(_CONFIG, _params(), ids[:, :length], 2)
    self.assertEqual(probes.read._cache_size() - before, 2)

  @pytest.mark.slow
  def test_single_token_has_no_loss(self):
    found = inspection.measure(_CONFIG, _params(), np.array([[3]]), 1)
    self.assertIsNone(found["loss"])
    self.assertIsNone(found["perplexity"])
    np.testing.assert_allclose(found["sink_mass"], 1, atol=_ATOL)

  def test_a_layer_without_weights_is_marked_and_no_trap_is_sprung(self):
    config = dataclasses.replace(
        _CONFIG, windows=(), attention=("lightning", "softmax")
    )
    params = applied.params(models.Transformer(config))
    names = ("sinks", "diversity", "secondary_sinks")
    with jax.debug_nans(True):  # On a device a NaN is a fault.
      found = inspection.measure(config, params, _IDS, 5, names=names)
    named = found["probes"]
    self.assertTrue(np.isfinite(named.pop("secondary_sinks")).all())
    for name in probes.Attention._fields:
      named[name] = found[name]
    for values in (*named.values(), found["sink_rate"]):
      self.assertTrue(np.isnan(values[0]).all())
      self.assertTrue(np.isfinite(values[1]).all())
    self.assertTrue(np.isfinite(found["stable_rank"]["up"]).all())


if __name__ == "__main__":
  absltest.main()
