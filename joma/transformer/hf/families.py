"""How each family of Hugging Face models spells a TransformerConfig.

One `Family` a model_type, all of them data: which field of config.json is which
of ours, what holds for every model of the type, what transformers assumes where
config.json is silent, and the two functions of `hf_fields` for what is no
renaming. `hf_config` applies them. Imports no jax.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from joma.transformer.config import TransformerConfig
from joma.transformer.hf import fields
from joma.transformer.hf.fields import Fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """One model_type.

  Attributes:
    architecture: Its class with an output layer, in `architectures`.
    names: Field of TransformerConfig -> field of config.json of equal value.
    defaults: What transformers assumes for fields that config.json leaves out;
      a field without one must be there, null is derived from other fields.
    fixed: Fields of TransformerConfig that every model of the type shares.
    neutral: Fields of config.json -> the values under which the model is still
      the one that is described here.
    gelu_tanh: Name of the tanh approximation of GELU that it writes.
    read: config.json and what is known so far -> further fields of ours.
    write: What `read` reads, from a TransformerConfig.
  """

  architecture: str
  names: Mapping[str, str]
  defaults: Fields = dataclasses.field(default_factory=dict)
  fixed: Fields = dataclasses.field(default_factory=dict)
  neutral: Mapping[str, tuple[Any, ...]] = dataclasses.field(
      default_factory=dict
  )
  gelu_tanh: str = "gelu_pytorch_tanh"
  read: Callable[[Fields, Fields], Fields]
  write: Callable[[TransformerConfig], Fields]


_LAYER_NORM = {"norm": "layer_norm", "use_gated_mlp": False}
_NO_PARTIAL = {"partial_rotary_factor": (None, 1.0)}
_ONE_WAY = {"use_bidirectional_attention": (None, False)}
_GEMMA = {"norm_scale_offset": 1.0}
_SANDWICH = {**_GEMMA, "norm_placement": "sandwich"}

_LLAMA_NAMES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "max_len": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "activation": "hidden_act",
    "tie_embeddings": "tie_word_embeddings",
    "attn_dropout": "attention_dropout",
}
_GEMMA2_NAMES = {**_LLAMA_NAMES, "activation": "hidden_activation"}

_LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_QWEN_DEFAULTS = {**_LLAMA_DEFAULTS, "max_position_embeddings": 32_768}
_GEMMA_DEFAULTS = {
    **_LLAMA_DEFAULTS,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        names=_LLAMA_NAMES,
        defaults=_LLAMA_DEFAULTS,
        neutral=_NO_PARTIAL,
        read=fields.read_llama,
        write=fields.write_llama,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        names=_LLAMA_NAMES,
        defaults={**_LLAMA_DEFAULTS, "max_position_embeddings": 131_072},
        neutral={**_NO_PARTIAL, "attention_bias": (None, False)},
        read=fields.read_mistral,
        write=fields.write_mistral,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        names=_LLAMA_NAMES,
        defaults=_QWEN_DEFAULTS,
        fixed={"use_qkv_bias": True},
        neutral=_NO_PARTIAL,
        read=fields.read_qwen,
        write=fields.write_qwen,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        names=_LLAMA_NAMES,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        fixed={"use_qk_norm": True},
        neutral=_NO_PARTIAL,
        read=fields.read_qwen3,
        write=fields.write_qwen3,
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        names=_LLAMA_NAMES,
        defaults=_GEMMA_DEFAULTS,
        fixed=_GEMMA,
        neutral={**_NO_PARTIAL, **_ONE_WAY},
        read=fields.read_gemma,
        write=fields.write_gemma,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        names=_GEMMA2_NAMES,
        defaults=_GEMMA_DEFAULTS,
        fixed=_SANDWICH,
        neutral={**_NO_PARTIAL, **_ONE_WAY},
        read=fields.read_gemma2,
        write=fields.write_gemma2,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        names=_GEMMA2_NAMES,
        defaults={**_GEMMA_DEFAULTS, "max_position_embeddings": 131_072},
        fixed={**_SANDWICH, "use_qk_norm": True},
        # Gemma 3's attention has no cap, whatever its config says.
        neutral={
            **_NO_PARTIAL,
            **_ONE_WAY,
            "attn_logit_softcapping": (None,),
        },
        read=fields.read_gemma3,
        write=fields.write_gemma3,
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        names={
            "vocab_size": "vocab_size",
            "num_layers": "n_layer",
            "embed_dim": "n_embd",
            "num_heads": "n_head",
            "hidden_dim": "n_inner",
            "max_len": "n_positions",
            "norm_epsilon": "layer_norm_epsilon",
            "activation": "activation_function",
            "tie_embeddings": "tie_word_embeddings",
            "dropout": "resid_pdrop",
            "attn_dropout": "attn_pdrop",
        },
        defaults={
            "n_inner": None,
            "n_positions": 1024,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            "resid_pdrop": 0.1,
            "attn_pdrop": 0.1,
        },
        fixed={
            **_LAYER_NORM,
            **dict.fromkeys(fields.BIASES, True),
            "positions": "learned",
        },
        neutral={
            "scale_attn_by_inverse_layer_idx": (None, False),
            "add_cross_attention": (None, False),
        },
        gelu_tanh="gelu_new",
        read=fields.read_gpt2,
        write=fields.write_gpt2,
    ),
    "opt": Family(
        architecture="OPTForCausalLM",
        names={
            "vocab_size": "vocab_size",
            "num_layers": "num_hidden_layers",
            "embed_dim": "hidden_size",
            "num_heads": "num_attention_heads",
            "hidden_dim": "ffn_dim",
            "max_len": "max_position_embeddings",
            "activation": "activation_function",
            "tie_embeddings": "tie_word_embeddings",
            "dropout": "dropout",
            "attn_dropout": "attention_dropout",
        },
        defaults={
            "max_position_embeddings": 2048,
            "activation_function": "relu",
            "tie_word_embeddings": True,
            "dropout": 0.1,
            "attention_dropout": 0.0,
        },
        # The learned table begins with two rows that no token uses.
        fixed={
            **_LAYER_NORM,
            "norm_epsilon": 1e-5,
            "positions": "learned",
            "position_offset": 2,
        },
        neutral={"layer_norm_elementwise_affine": (None, True)},
        gelu_tanh="gelu_new",
        read=fields.read_opt,
        write=fields.write_opt,
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        names={
            "vocab_size": "vocab_size",
            "num_layers": "num_hidden_layers",
            "embed_dim": "hidden_size",
            "num_heads": "num_attention_heads",
            "hidden_dim": "intermediate_size",
            "max_len": "max_position_embeddings",
            "norm_epsilon": "layer_norm_eps",
            "activation": "hidden_act",
            "tie_embeddings": "tie_word_embeddings",
            "use_parallel_residual": "use_parallel_residual",
            "dropout": "hidden_dropout",
            "attn_dropout": "attention_dropout",
        },
        defaults={
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu",
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        fixed={**_LAYER_NORM, "use_mlp_bias": True},
        gelu_tanh="gelu_new",
        read=fields.read_gpt_neox,
        write=fields.write_gpt_neox,
    ),
}
