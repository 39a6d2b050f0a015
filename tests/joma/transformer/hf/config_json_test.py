"""Tests of config.json of Hugging Face models, read and written."""

import dataclasses
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized

from joma.transformer import config as configs
from joma.transformer.hf import config_json
from joma.transformer.rope import config as rope_config
from scansnap_jax.experiment.errors import UserError
from tests.joma.transformer import tiny_models

_MISSING = object()


def _changed(name, **changes):
  fields = {**tiny_models.fields_of(name), **changes}
  return {k: v for k, v in fields.items() if v is not _MISSING}


class FromHfTest(parameterized.TestCase):

  def test_gemma3_is_what_its_paper_describes(self):
    config = tiny_models.config_of("gemma3_text")
    self.assertEqual(
        config,
        configs.TransformerConfig(
            vocab_size=61,
            num_layers=3,
            embed_dim=24,
            num_heads=4,
            num_kv_heads=2,
            head_dim=10,
            hidden_dim=20,
            max_len=80,
            norm="rms_norm",
            norm_placement="sandwich",
            norm_epsilon=1e-6,
            norm_scale_offset=1.0,
            rope=rope_config.RopeConfig(
                rope_type="linear", rope_theta=5000.0, factor=4.0
            ),
            local_rope_theta=100.0,
            activation="gelu_tanh",
            use_gated_mlp=True,
            tie_embeddings=True,
            embed_scale=24**0.5,
            windows=(5, 0, 5),
            attn_scale=17**-0.5,
            use_qk_norm=True,
        ),
    )

  def test_opt_350m_is_post_norm_between_projections(self):
    config = tiny_models.config_of("opt 350m")
    self.assertEqual(config.norm_placement, "post")
    self.assertFalse(config.use_final_norm)
    self.assertEqual(config.embed_proj_dim, 14)
    self.assertEqual(config.position_offset, 2)

  def test_sizes_that_are_absent_are_derived(self):
    llama = config_json.from_hf(
        _changed("llama", num_key_value_heads=_MISSING, head_dim=None)
    )
    self.assertEqual((llama.num_kv_heads, llama.head_dim), (4, 6))
    self.assertEqual(tiny_models.config_of("gpt2").hidden_dim, 96)

  @parameterized.parameters(
      ("llama", "tie_embeddings", False),
      ("gemma", "tie_embeddings", True),
      ("gpt2", "tie_embeddings", True),
      ("gpt_neox", "rotary_fraction", 0.25),
      ("gpt_neox", "use_parallel_residual", True),
      ("qwen2", "use_qkv_bias", True),
      ("qwen2", "use_attn_out_bias", False),
      ("qwen2", "windows", ()),
      ("mistral", "windows", (5, 5)),
      ("qwen2 with windows, tied", "windows", (0, 4, 4)),
      ("gemma2", "windows", (5, 0)),
      ("gpt2 untied, not scaled", "attn_scale", 1.0),
  )
  def test_silence_means_what_transformers_takes_it_for(
      self, name, field, value
  ):
    self.assertEqual(getattr(tiny_models.config_of(name), field), value)

  @parameterized.parameters(
      (
          "llama",
          {
              "rope_parameters": {
                  "rope_type": "linear",
                  "rope_theta": 5.0,
                  "factor": 2.0,
              }
          },
          {
              "rope_theta": 5.0,
              "rope_scaling": {"type": "linear", "factor": 2.0},
          },
      ),
      (
          "gpt_neox",
          {
              "rope_parameters": {
                  "rope_type": "default",
                  "rope_theta": 7.0,
                  "partial_rotary_factor": 0.5,
              }
          },
          {"rotary_emb_base": 7, "rotary_pct": 0.5, "rope_scaling": None},
      ),
      (
          "gemma3_text",
          {
              "rope_theta": _MISSING,
              "rope_local_base_freq": _MISSING,
              "rope_scaling": _MISSING,
              "sliding_window_pattern": _MISSING,
              "layer_types": [
                  "sliding_attention",
                  "full_attention",
                  "sliding_attention",
              ],
              "rope_parameters": {
                  "full_attention": {
                      "rope_type": "linear",
                      "rope_theta": 5000.0,
                      "factor": 4.0,
                  },
                  "sliding_attention": {
                      "rope_type": "default",
                      "rope_theta": 100.0,
                  },
              },
          },
          {},
      ),
  )
  def test_both_generations_say_the_same(self, name, newer, older):
    self.assertEqual(
        config_json.from_hf(_changed(name, **newer)),
        config_json.from_hf(_changed(name, **older)),
    )

  def test_old_gemma_says_gelu_and_means_tanh(self):
    config = config_json.from_hf(_changed("gemma", hidden_act="gelu"))
    self.assertEqual(config.activation, "gelu_tanh")

  @parameterized.parameters(
      ("llama", {"model_type": "mamba"}, "model_type='mamba'.*gpt2"),
      ("llama", {"model_type": _MISSING}, "model_type='None'.*llama"),
      ("llama", {"model_type": ["llama"]}, r"model_type=.*llama.*supported"),
      ("llama", {"hidden_act": "relu2"}, "hidden_act='relu2'.*silu"),
      ("llama", {"hidden_size": _MISSING}, "hidden_size is missing"),
      ("llama", {"hidden_size": None}, "hidden_size is null"),
      ("llama", {"hidden_size": "24"}, "hidden_size must be a whole.*'24'"),
      ("llama", {"num_hidden_layers": True}, "num_hidden_layers must be.*True"),
      ("llama", {"rms_norm_eps": "x"}, "rms_norm_eps must be a number.*'x'"),
      ("llama", {"mlp_bias": 1}, "mlp_bias must be true or false, got 1"),
      ("llama", {"hidden_size": 25}, "25 is no multiple of 4"),
      (
          "llama",
          {"quantization_config": {"bits": 4}},
          "quantization_config=.*bits.*null",
      ),
      (
          "llama",
          {"rope_scaling": {"type": "wavy", "factor": 2.0}},
          "rope_type 'wavy'.*yarn",
      ),
      (
          "llama",
          {"rope_parameters": {"rope_type": ["yarn"]}},
          r"rope_parameters.rope_type must be a name, got \['yarn'\]",
      ),
      (
          "gemma3_text",
          {"rope_parameters": {"sliding_attention": 3}},
          "rope_parameters.sliding_attention must be a dictionary, got 3",
      ),
      ("gpt_neox", {"rotary_pct": 1.5}, r"rotary_pct.*\(0, 1\], got 1.5"),
      ("llama", {"num_attention_heads": 0}, "num_attention_heads must be from"),
      ("llama", {"rope_scaling": "yarn"}, "rope_scaling must be a dictionary"),
      (
          "llama",
          {"rope_parameters": {"partial_rotary_factor": 0.5}},
          "partial_rotary_factor=0.5.*null, 1.0",
      ),
      (
          "mistral",
          {"layer_types": ["sliding_attention", "full_attention"]},
          "layer_types=.*sliding_window=5",
      ),
      ("mistral", {"sliding_window": "5"}, "sliding_window must be.*'5'"),
      ("mistral", {"attention_bias": True}, "attention_bias=True.*false"),
      (
          "qwen3",
          {"layer_types": ["chunked_attention"] * 2},
          "layer_types=chunked_attention.*sliding_attention",
      ),
      ("qwen3", {"layer_types": ["full_attention"]}, "1 layers.*is 2"),
      (
          "qwen2",
          {"layer_types": ["sliding_attention"] * 2},
          "use_sliding_window=false",
      ),
      (
          "gpt2",
          {"scale_attn_by_inverse_layer_idx": True},
          "scale_attn_by_inverse_layer_idx=True.*false",
      ),
      ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
      (
          "opt",
          {"layer_norm_elementwise_affine": False},
          "layer_norm_elementwise_affine=False.*true",
      ),
      (
          "gemma2",
          {"use_bidirectional_attention": True},
          "use_bidirectional_attention=True.*false",
      ),
      ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be"),
      ("gemma", {"hidden_activation": "relu"}, "hidden_activation='relu'"),
      (
          "gemma3_text",
          {"attn_logit_softcapping": 50.0},
          "attn_logit_softcapping=50.0.*null",
      ),
      (
          "gemma3_text",
          {
              "rope_parameters": {
                  "full_attention": {"rope_type": "default"},
                  "sliding_attention": {"rope_type": "linear", "factor": 2.0},
              }
          },
          "sliding_attention.rope_type='linear'",
      ),
  )
  def test_what_it_cannot_describe_is_named(self, name, changes, message):
    with self.assertRaisesRegex(UserError, message):
      config_json.from_hf(_changed(name, **changes))


class ToHfTest(parameterized.TestCase):

  @parameterized.parameters(*tiny_models.NAMES)
  def test_what_was_written_reads_as_it_was(self, name):
    config = tiny_models.config_of(name)
    family = tiny_models.fields_of(name)["model_type"]
    fields = config_json.to_hf(config, family)
    self.assertEqual(config_json.from_hf(fields), config)
    self.assertEqual(
        config_json.to_hf(config_json.from_hf(fields), family), fields
    )

  @parameterized.parameters(*tiny_models.NAMES)
  def test_a_family_is_found_that_can_describe_it(self, name):
    config = tiny_models.config_of(name)
    fields = config_json.to_hf(config)
    self.assertEqual(config_json.from_hf(fields), config)

  def test_older_readers_find_their_fields(self):
    fields = config_json.to_hf(tiny_models.config_of("llama 3"), "llama")
    self.assertEqual(fields["rope_theta"], 5e5)
    self.assertEqual(fields["rope_scaling"]["rope_type"], "llama3")
    self.assertEqual(fields["rope_scaling"], fields["rope_parameters"])

  def test_ntk_frequencies_are_written_as_their_base(self):
    config = dataclasses.replace(
        tiny_models.config_of("llama with biases, tied"),
        rope=rope_config.RopeConfig(
            rope_type="ntk", rope_theta=100.0, factor=2.0
        ),
    )
    # d = 10: 100 * 2^(10 / 8).
    self.assertAlmostEqual(
        config_json.to_hf(config, "llama")["rope_theta"], 100 * 2**1.25
    )

  def test_dropout_need_not_be_said(self):
    config = dataclasses.replace(tiny_models.config_of("llama"), dropout=0.1)
    self.assertEqual(config_json.to_hf(config)["model_type"], "llama")

  @parameterized.parameters(
      ("llama", {"use_qk_norm": True}, "llama cannot say use_qk_norm=True"),
      ("llama", {"use_output_bias": True}, "cannot say use_output_bias"),
      ("mistral", {"windows": (5, 3)}, r"mistral cannot say windows=\(5, 3\)"),
      ("gemma2", {"attn_scale": 0.3}, "gemma2 cannot say attn_scale=0.3"),
      ("gemma2", {"embed_scale": 1.0}, "gemma2 cannot say embed_scale=1.0"),
      ("llama", {"activation": "quadratic"}, "cannot say activation"),
  )
  def test_what_a_family_cannot_say_is_named(self, name, changes, message):
    config = dataclasses.replace(tiny_models.config_of(name), **changes)
    with self.assertRaisesRegex(UserError, message):
      config_json.to_hf(config, name)

  def test_a_model_that_no_family_describes_is_refused(self):
    with self.assertRaisesRegex(UserError, "cannot say .*sinusoidal"):
      config_json.to_hf(configs.authors_encoder())

  def test_an_unknown_family_is_named(self):
    with self.assertRaisesRegex(UserError, "'mamba'.*llama"):
      config_json.to_hf(tiny_models.config_of("llama"), "mamba")


class ImportTest(absltest.TestCase):

  def test_imports_no_jax(self):
    script = (
        "import sys; from joma.transformer.hf import config_json, tensors;"
        " print('jax' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )
    self.assertEqual(run.stdout.strip(), "False", run.stderr)


if __name__ == "__main__":
  absltest.main()
