"""Tests of rotary frequencies and of the rotation."""

import math
import unittest
import warnings

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import config as configs
from joma.transformer.rope import config as rope_config
from joma.transformer.rope import rotary
from scansnap_jax.experiment import errors

# Rounding of one float32 number.
_RTOL = 1e-6
# Ten times the rounding of float32 scores of size 10.
_ATOL = 2e-5

# One dictionary a kind, in the newer form.
_KINDS = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn_all": {
        "rope_type": "yarn",
        "rope_theta": 5e5,
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 24,
        "beta_slow": 2,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn_attention": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 0.75,
    },
    "yarn_from_lengths": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": None,
        "original_max_position_embeddings": 512,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 1024,
    },
    "longrope_factor": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": 1024,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "original_max_position_embeddings": 1024,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}
_HEAD_DIM, _MAX_LEN = 32, 2048


def _parameters(kind, fraction):
  parameters = dict(_KINDS[kind])
  if kind.startswith("longrope"):
    num_pairs = int(_HEAD_DIM * fraction) // 2
    parameters["short_factor"] = list(np.linspace(1, 1.5, num_pairs))
    parameters["long_factor"] = list(np.linspace(1, 9, num_pairs))
  return parameters


def _older(parameters):
  """The same settings as transformers 4 wrote them, in a whole config."""
  scaling = dict(parameters, type=parameters["rope_type"])
  theta = scaling.pop("rope_theta")
  del scaling["rope_type"]
  if scaling["type"] == "default":
    scaling = None
  return {"rope_theta": theta, "rope_scaling": scaling, "model_type": "llama"}


def _theirs(parameters, fraction, seq_len):
  """Computes the frequencies with transformers; skips where it is absent."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
      from transformers import LlamaConfig
      from transformers import modeling_rope_utils
      from transformers.models.llama import modeling_llama
    except ImportError as error:
      raise unittest.SkipTest(f"transformers with torch: {error}") from error
  config = LlamaConfig(
      head_dim=_HEAD_DIM,
      hidden_size=2 * _HEAD_DIM,
      num_attention_heads=2,
      max_position_embeddings=_MAX_LEN,
      rope_parameters=dict(parameters, partial_rotary_factor=fraction),
  )
  kind = parameters["rope_type"]
  if kind == "default":
    if fraction != 1:
      raise unittest.SkipTest("their plain kind rotates whole heads")
    compute = (
        modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters
    )
  else:
    compute = modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind]
  inv_freq, attn_factor = compute(config, device="cpu", seq_len=seq_len)
  return inv_freq.numpy(), attn_factor


class FrequenciesTest(parameterized.TestCase):

  @parameterized.product(
      kind=tuple(_KINDS), fraction=(1.0, 0.5), seq_len=(None, 700, 5000)
  )
  def test_every_kind_equals_transformers(self, kind, fraction, seq_len):
    parameters = _parameters(kind, fraction)
    expected, expected_factor = _theirs(parameters, fraction, seq_len)
    rotary_dim = int(_HEAD_DIM * fraction)
    for mapping in (parameters, _older(parameters)):
      inv_freq, attn_factor = rotary.frequencies(
          mapping, rotary_dim, _MAX_LEN, seq_len
      )
      chex.assert_type(inv_freq, jnp.float32)
      np.testing.assert_allclose(inv_freq, expected, rtol=_RTOL)
      self.assertAlmostEqual(attn_factor, expected_factor, delta=_RTOL)

  @parameterized.parameters(
      # theta_j = 100^(-j / 2).
      ({}, [1, 0.1]),
      ({"rope_type": "linear", "factor": 4.0}, [0.25, 0.025]),
      # d / (d - 2) = 2: base 100 * 16, whose root is 40.
      ({"rope_type": "ntk", "factor": 4.0}, [1, 0.025]),
      # Up to L = 8 nothing changes.
      ({"rope_type": "dynamic", "factor": 2.0}, [1, 0.1]),
  )
  def test_frequencies_derived_by_hand(self, fields, expected):
    config = rope_config.RopeConfig(rope_theta=100.0, **fields)
    inv_freq, attn_factor = rotary.frequencies(config, 4, 8)
    np.testing.assert_allclose(inv_freq, expected, rtol=_RTOL)
    self.assertEqual(attn_factor, 1)

  def test_dynamic_base_grows_with_the_text(self):
    config = rope_config.RopeConfig(
        rope_type="dynamic", rope_theta=100.0, factor=2.0
    )
    # T = 2 L: s T / L - (s - 1) = 3, base 100 * 3^2.
    for seq_len in (16, jnp.int32(16)):
      inv_freq, _ = rotary.frequencies(config, 4, 8, seq_len)
      np.testing.assert_allclose(inv_freq, [1, 1 / 30], rtol=_RTOL)

  def test_yarn_ramp_derived_by_hand(self):
    # theta_j = 10^-j, and L = 200 pi turns pair j 100 * 10^-j times: pair 0
    # is kept from 100 turns on, pair 2 interpolated from 1 turn down, pair 1
    # halfway between. 628 is L to 5 digits; whole pairs absorb the rest.
    config = rope_config.RopeConfig(
        rope_type="yarn", factor=4.0, original_max_len=628, beta_fast=99.0
    )  # pyformat: disable
    inv_freq, attn_factor = rotary.frequencies(config, 8, 2512)
    expected = [1, 0.1 * (1 + 1 / 4) / 2, 0.01 / 4, 0.001 / 4]
    np.testing.assert_allclose(inv_freq, expected, rtol=_RTOL)
    self.assertAlmostEqual(attn_factor, 0.1 * math.log(4) + 1, delta=_RTOL)

  def test_llama3_blend_derived_by_hand(self):
    # Turns over L = 628: 99.95, 9.995, .9995, .09995. Between 2 and 20 turns
    # the blend keeps (turns - 2) / 18.
    config = rope_config.RopeConfig(
        rope_type="llama3",
        factor=8.0,
        original_max_len=628,
        low_freq_factor=2.0,
        high_freq_factor=20.0,
    )  # pyformat: disable
    inv_freq, _ = rotary.frequencies(config, 8, 5024)
    kept = (62.8 / (2 * math.pi) - 2) / 18
    expected = [1, 0.1 * (kept + (1 - kept) / 8), 0.01 / 8, 0.001 / 8]
    np.testing.assert_allclose(inv_freq, expected, rtol=_RTOL)

  def test_longrope_changes_sets_beyond_its_original_length(self):
    config = rope_config.RopeConfig(
        rope_type="longrope",
        rope_theta=100.0,
        original_max_len=8,
        short_factor=(1.0, 2.0),
        long_factor=(4.0, 5.0),
    )  # pyformat: disable
    for seq_len, expected in (
        (None, [1, 0.05]),
        (8, [1, 0.05]),
        (9, [0.25, 0.02]),
        (jnp.int32(8), [1, 0.05]),
        (jnp.int32(9), [0.25, 0.02]),
    ):
      inv_freq, attn_factor = rotary.frequencies(config, 4, 64, seq_len)
      np.testing.assert_allclose(inv_freq, expected, rtol=_RTOL)
      # s = 64 / 8: ln 8 / ln 8 = 1.
      self.assertAlmostEqual(attn_factor, math.sqrt(2), delta=_RTOL)

  @parameterized.parameters(
      ({}, 3, "rotary_dim=3"),
      ({"rope_type": "ntk", "factor": 2.0}, 2, "at least 4, got 2"),
      (
          {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]},
          4,
          "2 pairs that are rotated, got 1",
      ),
  )
  def test_width_that_does_not_fit_is_refused(self, mapping, dim, message):
    with self.assertRaisesRegex(errors.UserError, message):
      rotary.frequencies(mapping, dim, 8)


def _normal(seed, *shape, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


class RotateTest(parameterized.TestCase):

  def test_quarter_turns_pair_the_halves_and_leave_the_rest(self):
    x = jnp.array([1.0, 2, 3, 4, 5])[None, None, None]
    quarter = jnp.array([math.pi / 2, math.pi])
    out = rotary.rotate(x, jnp.array([[1]]), quarter, 2.0)
    # Pair (1, 3) turned by 90 degrees, (2, 4) by 180, both doubled.
    np.testing.assert_allclose(out[0, 0, 0], [-6, -4, 2, -8, 5], atol=_ATOL)

  @parameterized.parameters("linear", "yarn", "llama3")
  @pytest.mark.by_default(0, 1)
  def test_scores_depend_on_distances_only(self, kind):
    inv_freq, attn_factor = rotary.frequencies(_KINDS[kind], 16, _MAX_LEN)
    query, key = _normal(0, 1, 6, 2, 24), _normal(1, 1, 6, 2, 24)

    def scores(start):
      positions = start + jnp.arange(6)[None]
      turn = lambda x: rotary.rotate(x, positions, inv_freq, attn_factor)
      return jnp.einsum("BTNH,BSNH->BNTS", turn(query), turn(key))

    # Rounding of float32 angles of 300.
    chex.assert_trees_all_close(scores(0), scores(300), atol=1e-3)
    moved = scores(0) - jnp.einsum("BTNH,BSNH->BNTS", query, key)
    self.assertGreater(jnp.abs(moved).max(), 0.1)

  def test_lengths_of_pairs_are_kept(self):
    x = _normal(2, 2, 5, 3, 8)
    positions = jnp.arange(10).reshape(2, 5)
    inv_freq, _ = rotary.frequencies({}, 8, 64)
    out = rotary.rotate(x, positions, inv_freq)
    lengths = lambda x: jnp.hypot(x[..., :4], x[..., 4:])
    chex.assert_trees_all_close(lengths(out), lengths(x), atol=_ATOL)

  def test_equals_transformers(self):
    expected_freq, _ = _theirs(_KINDS["default"], 1.0, None)
    import torch
    from transformers.models.llama import modeling_llama

    x = _normal(3, 2, 7, 3, _HEAD_DIM)
    positions = jnp.array([[3, 1, 4, 1, 5, 9, 2], [0, 1, 2, 3, 4, 5, 6]])
    angles = np.asarray(positions)[..., None] * expected_freq
    angles = torch.tensor(np.concatenate([angles, angles], -1))
    expected, _ = modeling_llama.apply_rotary_pos_emb(
        *2 * [torch.tensor(np.asarray(x))],
        angles.cos(),
        angles.sin(),
        unsqueeze_dim=2,
    )
    inv_freq, _ = rotary.frequencies({}, _HEAD_DIM, _MAX_LEN)
    out = rotary.rotate(x, positions, inv_freq)
    np.testing.assert_allclose(out, expected.numpy(), atol=_ATOL)

  def test_bfloat16_is_turned_in_float32(self):
    x = _normal(4, 1, 4, 1, 6, dtype=jnp.bfloat16)
    positions = 1000 + jnp.arange(4)[None]
    inv_freq, _ = rotary.frequencies({}, 4, 64)
    out = rotary.rotate(x, positions, inv_freq)
    expected = rotary.rotate(x.astype(jnp.float32), positions, inv_freq)
    chex.assert_trees_all_equal(out, expected.astype(jnp.bfloat16))


class RotateByTest(parameterized.TestCase):

  @parameterized.parameters("dynamic", "longrope")
  @pytest.mark.by_default(0)
  def test_each_sequence_turns_by_its_own_length_under_one_compilation(
      self, kind
  ):
    config = configs.TransformerConfig(
        head_dim=8, max_len=8, rotary_fraction=0.5
    )
    kinds = {
        "dynamic": {"factor": 2.0},
        "longrope": {
            "short_factor": (1.0, 1.0),
            "long_factor": (2.0, 3.0),
            "factor": 2.0,
        },
    }
    kind = rope_config.RopeConfig(rope_type=kind, **kinds[kind])
    x = _normal(5, 2, 12, 1, 8)

    traced = []

    @jax.jit
    def rotate(x, positions):
      traced.append(x.shape)
      return rotary.rotate_by(x, positions, kind, config)

    for lengths in ((6, 12), (12, 9)):
      positions = jnp.tile(jnp.arange(12)[None], (2, 1))
      positions = jnp.where(
          positions < jnp.array(lengths)[:, None], positions, -1
      )
      out = rotate(x, positions)
      row = lengths.index(min(lengths))  # 6 is within L = 8, 9 beyond.
      inv_freq, attn_factor = rotary.frequencies(kind, 4, 8, lengths[row])
      expected = rotary.rotate(
          x[row][None], positions[row][None], inv_freq, attn_factor
      )
      chex.assert_trees_all_close(out[row], expected[0], atol=_ATOL)
    self.assertLen(traced, 1)


if __name__ == "__main__":
  absltest.main()
