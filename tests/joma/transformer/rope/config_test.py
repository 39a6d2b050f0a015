"""Tests of rotary settings and of Hugging Face's dictionaries of them."""

import math
import subprocess
import sys

from absl import flags
from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from joma.transformer import config as configs
from joma.transformer.rope import config as rope_config
from joma.transformer.rope import rotary
from launch.command import flag_config
from scansnap_jax.experiment import errors

RopeConfig = rope_config.RopeConfig

_KINDS = (
    RopeConfig(rope_theta=5e5),
    RopeConfig(rope_type="linear", factor=4.0),
    RopeConfig(rope_type="dynamic", factor=2.0),
    RopeConfig(rope_type="yarn", factor=4.0),
    RopeConfig(rope_type="yarn", original_max_len=16),
    RopeConfig(
        rope_type="yarn",
        factor=4.0,
        original_max_len=16,
        attention_factor=1.5,
        beta_fast=24.0,
        beta_slow=2.0,
        mscale=1.2,
        mscale_all_dim=0.7,
        truncate=False,
    ),
    RopeConfig(
        rope_type="longrope",
        original_max_len=4096,
        attention_factor=1.1,
        short_factor=(1.0, 1.5),
        long_factor=(1.0, 1 / 3),
    ),
    RopeConfig(rope_type="llama3", factor=8.0),
    RopeConfig(
        rope_type="llama3",
        factor=32.0,
        original_max_len=8192,
        low_freq_factor=1.5,
        high_freq_factor=3.0,
    ),
)


class RopeConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      ({"factor": 4.0}, "factor=4.0 has no effect with rope_type=default"),
      (
          {"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0},
          "beta_fast=3.0 has no effect with rope_type=linear",
      ),
      ({"rope_type": "ntk"}, "rope_type=ntk needs factor"),
      ({"rope_type": "longrope"}, "rope_type=longrope needs short_factor"),
      ({"rope_theta": 1.0}, "rope_theta must be above 1, got 1.0"),
      ({"rope_theta": math.inf}, "rope_theta must be positive and finite"),
      ({"rope_type": "linear", "factor": 0.5}, "factor must be at least 1"),
      (
          {"rope_type": "linear", "factor": math.nan},
          "factor must be positive and finite, got nan",
      ),
      (
          {"rope_type": "yarn", "factor": 2.0, "original_max_len": 0},
          "original_max_len must be at least 1, got 0",
      ),
      (
          {"rope_type": "yarn", "factor": 2.0, "beta_slow": 32.0},
          "beta_slow must be below beta_fast, got 32.0 and 32.0",
      ),
      (
          {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": -1.0},
          "low_freq_factor must be positive",
      ),
      (
          {
              "rope_type": "longrope",
              "short_factor": (1.0,),
              "long_factor": (0.0,),
          },
          "each of short_factor and long_factor must be positive",
      ),
      (
          {
              "rope_type": "longrope",
              "short_factor": (1.0,),
              "long_factor": (1.0, 2.0),
          },
          "one number a pair each, got 1 and 2",
      ),
  )
  def test_setting_that_cannot_be_meant_is_refused(self, fields, message):
    with self.assertRaisesRegex(errors.UserError, message):
      RopeConfig(**fields)

  def test_flags_hold_every_kind_inside_of_a_model(self):
    for kind in _KINDS:
      config = configs.TransformerConfig(rope=kind)
      text = flag_config.to_flagfile(config, {})
      values = flags.FlagValues()
      build = flag_config.define(
          configs.TransformerConfig(), flag_values=values
      )
      values(["test", *text.splitlines()])
      self.assertEqual(build(), config)

  def test_wrong_flag_is_named(self):
    values = flags.FlagValues()
    build = flag_config.define(configs.TransformerConfig(), flag_values=values)
    values(["test", "--rope.rope_type=linear", "--rope.factor=0.5"])
    with self.assertRaisesRegex(errors.UserError, r"from --rope.factor\)"):
      build()


class HuggingFaceTest(parameterized.TestCase):

  @parameterized.parameters(*range(len(_KINDS)))
  def test_what_is_written_reads_back_equal(self, index):
    kind = _KINDS[index]
    self.assertEqual(rope_config.from_hf(kind.to_hf()), kind)
    whole = {"model_type": "llama", "rope_parameters": kind.to_hf()}
    self.assertEqual(rope_config.from_hf(whole), kind)

  def test_ntk_is_written_as_the_base_that_it_stands_for(self):
    kind = RopeConfig(rope_type="ntk", factor=4.0)
    written = rope_config.from_hf(kind.to_hf(rotary_dim=16))
    self.assertEqual(written.rope_type, "default")
    np.testing.assert_allclose(
        rotary.frequencies(written, 16, 64)[0],
        rotary.frequencies(kind, 16, 64)[0],
        rtol=1e-6,
    )
    with self.assertRaisesRegex(errors.UserError, "give rotary_dim"):
      kind.to_hf()

  @parameterized.parameters(
      ({}, RopeConfig()),
      ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(rope_theta=5e5)),
      ({"rope_theta": 100, "model_type": "x"}, RopeConfig(rope_theta=100.0)),
      (
          {"rotary_emb_base": 1e5, "rotary_pct": 0.25},
          RopeConfig(rope_theta=1e5),
      ),
      (
          {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}},
          RopeConfig(rope_type="linear", rope_theta=1e6, factor=2.0),
      ),
      # Both names, as Llama 3.1's first folders had them.
      (
          {"rope_scaling": {"type": "x", "rope_type": "dynamic", "factor": 2}},
          RopeConfig(rope_type="dynamic", factor=2.0),
      ),
      # The older key counts where both are there.
      (
          {
              "rope_scaling": {"type": "linear", "factor": 2.0},
              "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
          },
          RopeConfig(rope_type="linear", factor=2.0),
      ),
      (
          {
              "rope_scaling": {
                  "type": "su",
                  "short_factor": [1],
                  "long_factor": [2],
              },
              "original_max_position_embeddings": 4096,
          },
          RopeConfig(
              rope_type="longrope",
              original_max_len=4096,
              short_factor=(1.0,),
              long_factor=(2.0,),
          ),
      ),
      # Keys that a kind does not read.
      (
          {"rope_type": "default", "factor": 3.0, "mrope_section": [1, 2]},
          RopeConfig(),
      ),
  )
  def test_either_generation_is_read(self, mapping, expected):
    self.assertEqual(rope_config.from_hf(mapping), expected)

  def test_base_falls_back_to_the_familys(self):
    config = rope_config.from_hf({"model_type": "x"}, default_theta=5e5)
    self.assertEqual(config.rope_theta, 5e5)

  def test_kinds_of_layers_are_read_one_at_a_time(self):
    by_layer = {
        "full_attention": {"rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e5},
    }
    for mapping in (by_layer, {"rope_parameters": by_layer, "vocab_size": 3}):
      local = rope_config.from_hf(mapping, layer_type="sliding_attention")
      self.assertEqual(local, RopeConfig(rope_theta=1e5))
      whole = rope_config.from_hf(mapping, layer_type="full_attention")
      self.assertEqual(whole.factor, 8)
      with self.assertRaisesRegex(
          errors.UserError, "one of full_attention, sliding_attention, got None"
      ):
        rope_config.from_hf(mapping)

  @parameterized.parameters(
      (
          {"rope_type": "llama4"},
          "unknown rope_type 'llama4'; known are default, linear",
      ),
      ({"rope_scaling": {"type": "mrope"}}, "unknown rope_type 'mrope'"),
      ({"rope_type": "linear"}, "rope_type=linear needs factor"),
      (
          {"rope_type": "linear", "factor": "4"},
          "factor must be a number, got '4'",
      ),
      ({"rope_type": "linear", "factor": True}, "factor must be a number"),
      ({"rope_type": "linear", "factor": 10**400}, "factor must be a number"),
      (
          {
              "rope_type": "yarn",
              "original_max_position_embeddings": float("inf"),
          },
          "original_max_len must be a number, got inf",
      ),
      (
          {"rope_type": "yarn", "original_max_position_embeddings": 1.5},
          "original_max_len must be a whole number",
      ),
      (
          {"rope_type": "yarn", "factor": 2, "truncate": 1},
          "truncate must be true or false",
      ),
      (
          {"rope_type": "longrope", "short_factor": 1, "long_factor": [1]},
          "short_factor must be a list of numbers, got 1",
      ),
      (
          {"rope_type": "longrope", "short_factor": [1], "long_factor": ["a"]},
          r"long_factor\[0\] must be a number",
      ),
  )
  def test_dictionary_that_is_wrong_is_refused(self, mapping, message):
    with self.assertRaisesRegex(errors.UserError, message):
      rope_config.from_hf(mapping)


class ImportTest(absltest.TestCase):

  def test_settings_do_not_wait_for_jax(self):
    code = (
        "import sys; from joma.transformer.rope import config;"
        "print({'jax', 'flax', 'numpy', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    self.assertEqual(result.stdout, "set()\n")


if __name__ == "__main__":
  absltest.main()
