"""config.json of tiny models, every family and every option of theirs."""

import numpy as np

from joma.transformer.hf import config_json
from joma.transformer.hf import tensors

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
}
_LLAMA = {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 20}
_OPT = {**_SIZES, "ffn_dim": 20}
_NEOX = {**_SIZES, "hidden_size": 32, "intermediate_size": 20}
_GPT2 = {
    "vocab_size": 61,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 80,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# Where head_dim is free it is not D / N.
FIELDS = {
    "gpt2": _GPT2,
    "opt": _OPT,
    "gpt_neox": _NEOX,
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 5},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 10},
    "gemma": {**_LLAMA, "num_key_value_heads": 1, "head_dim": 10},
    "gemma2": {
        **_LLAMA,
        "head_dim": 10,
        "sliding_window": 5,
        "query_pre_attn_scalar": 17,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **_LLAMA,
        "num_hidden_layers": 3,
        "head_dim": 10,
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 17,
        "rope_theta": 5000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
}
VARIANTS = {
    "gpt2 untied, not scaled": {
        **_GPT2,
        "model_type": "gpt2",
        "n_inner": 20,
        "tie_word_embeddings": False,
        "scale_attn_weights": False,
        "activation_function": "relu",
    },
    "opt 350m": {
        **_OPT,
        "model_type": "opt",
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 14,
    },
    "opt untied, projected": {
        **_OPT,
        "model_type": "opt",
        "word_embed_proj_dim": 14,
        "tie_word_embeddings": False,
    },
    "opt without biases and last norm": {
        **_OPT,
        "model_type": "opt",
        "enable_bias": False,
        "_remove_final_layer_norm": True,
        "activation_function": "gelu",
    },
    "gpt_neox one after the other": {
        **_NEOX,
        "model_type": "gpt_neox",
        "use_parallel_residual": False,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_new",
        "rotary_pct": 1.0,
        "rotary_emb_base": 500,
    },
    "llama with biases, tied": {
        **_LLAMA,
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "head_dim": 10,
        "hidden_act": "gelu",
    },
    "llama 3": {
        **_LLAMA,
        "model_type": "llama",
        "rope_parameters": {"rope_theta": 5e5, **_LLAMA3},
    },
    "llama yarn": {
        **_LLAMA,
        "model_type": "llama",
        "rope_theta": 1e4,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 20,
        },
    },
    "mistral without windows": {
        **_LLAMA,
        "model_type": "mistral",
        "sliding_window": None,
    },
    "qwen2 with windows, tied": {
        **_LLAMA,
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3 with windows and biases": {
        **_LLAMA,
        "model_type": "qwen3",
        "head_dim": 10,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma with biases, untied": {
        **_LLAMA,
        "model_type": "gemma",
        "head_dim": 10,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "gemma2 without caps": {
        **_LLAMA,
        "model_type": "gemma2",
        "head_dim": 10,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 3,
    },
    "gemma2 without windows": {
        **_LLAMA,
        "model_type": "gemma2",
        "head_dim": 10,
        "layer_types": ["full_attention"] * 2,
    },
    "gemma3 of this generation": {
        **_LLAMA,
        "model_type": "gemma3_text",
        "head_dim": 10,
        "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 3,
        "rope_parameters": {
            "full_attention": {
                "rope_theta": 700.0,
                "rope_type": "linear",
                "factor": 2.0,
            },
            "sliding_attention": {"rope_theta": 90.0, "rope_type": "default"},
        },
    },
}
NAMES = (*FIELDS, *VARIANTS)


def fields_of(name):
  """Returns config.json of a family by its model_type, or of a variant."""
  if name in FIELDS:
    return {"model_type": name, **FIELDS[name]}
  return dict(VARIANTS[name])


def config_of(name):
  """Returns the TransformerConfig of a family or variant."""
  return config_json.from_hf(fields_of(name))


def flat_params(name, seed=0):
  """Returns random leaves by their paths: no two numbers are the same."""
  config = config_of(name)
  table = tensors.TABLES[fields_of(name)["model_type"]]
  sizes = tensors.sizes_of(config)
  generator = np.random.default_rng(seed)
  return {
      leaf: (
          generator.normal(
              scale=0.15, size=tensors.leaf_shape(row.pattern, sizes)
          ).astype(np.float32)
      )
      for row in table.rows_of(config)
      for leaf in row.leaves.split()
  }
